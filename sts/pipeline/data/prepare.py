"""From a registered data set to Arrow files and a manifest; bad rows are counted and listed, and so
are the files of the user's that the rows come from."""

import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, compress, islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from datasets import Features, List, Value
from datasets import Image as ImageColumn
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from tqdm import tqdm

from sts.pipeline.config import SPLITS, Config, DataConfig
from sts.pipeline.data.origins import LIST, origin, state
from sts.pipeline.data.pictures import is_deep, rgb
from sts.pipeline.data.registry import DataSet, load
from sts.pipeline.data.rows import (
    IMAGE_TOKEN,
    ROLES,
    BadRow,
    Rows,
    columns_of,
    conversation,
    images_of,
)
from sts.pipeline.data.source import BOMB, BROKEN_IMAGE, DOWNLOADS, DataError
from sts.pipeline.files import hashes, sha256_json, write_json_atomic, write_text_atomic

CHUNK = 100  # rows of a record batch, which may hold large images
TOGETHER = 64  # rows whose images are decoded at once, by all threads
TEXT = Value("string")
TURNS = List({"from": TEXT, "value": TEXT})
IMAGE = ImageColumn()  # in RGB by pictures.rgb
NUMBER = Value("int64")
# of the images that are held as a path
ORIGINS = List({"path": TEXT, "size": NUMBER, "mtime_ns": NUMBER, "sha256": TEXT})
TRAINING = Features({"id": TEXT, "image": IMAGE, "conversations": TURNS, "origins": ORIGINS})
SEVERAL = Features({"id": TEXT, "images": List(IMAGE), "conversations": TURNS, "origins": ORIGINS})
BENCHMARK = Features({"id": TEXT, "image": IMAGE, "question": TEXT, "answer": TEXT, "form": TEXT})
LONGEST = 200  # times its shorter side, above which processors refuse a picture or make it empty

# The images of a row as (table cell, pixels), and what is odd about it; or why it is bad. Odd is
# what others stumble over and this pipeline doesn't: labels are found by rendering, images are
# opened by what they are.
Verdict = tuple[list[tuple[dict, np.ndarray]], list[str]] | BadRow
Checked = tuple[dict, Verdict, list[dict]]  # a row, what is said of it, the files of its images


def prepare(config: Config, name: str, out: str | Path) -> dict[str, Any]:
    """Write a data set's splits as Arrow files beside its manifest `out`; return the manifest.

    Rows that can't be used are listed in bad_rows.jsonl, files that were read in origins.jsonl. All
    are written aside and renamed when all are whole, the manifest last.

    Raises:
        DataError: the data can't be had, a split is empty, or the share of bad rows is above
            data.max_bad_share; the list of bad rows stays.
    """
    out = Path(out)
    word = state(out)  # as the workflow reads it before this call
    entry, splits, tables = load(config, name)
    part = out.parent / ".part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        bad: list[dict] = []
        notes: Counter[str] = Counter()
        described = {}
        with (part / LIST).open("w", encoding="utf-8") as listing:
            listing.write(json.dumps(word) + "\n")
            follow = partial(_follow, entry, listing)
            follow(map(origin, tables))
            for split, rows in splits.items():
                file, is_test = part / f"{split}.arrow", split.startswith("test_")
                if name in config.data.rows and split in SPLITS:
                    rows = _subset(rows, config.data.rows[name])
                progress = tqdm(rows[1], f"{name} {split}", rows[0], unit="row", disable=None)
                checked = _checked(progress, entry.embed or is_test, config.data)
                described[split] = _write(checked, file, bad, notes, follow)
        report = out.parent / "bad_rows.jsonl"
        write_text_atomic(report, "".join(json.dumps(row) + "\n" for row in bad))
        reasons = dict(Counter(row["reason"] for row in bad))
        _check(name, entry.homepage, described, reasons, config.data.max_bad_share, report)
        out.unlink(missing_ok=True)  # from here to the end there is no valid manifest
        for file in [LIST, *(split["file"] for split in described.values())]:
            os.replace(part / file, out.parent / file)
    finally:
        shutil.rmtree(part)
    manifest = {"dataset": name, "version": entry.version, "licence": entry.licence}
    manifest |= {"splits": described, "bad_rows": reasons}
    manifest["sha256"] = sha256_json(manifest)
    manifest["files"] = hashes(out.parent, [out.parent / s["file"] for s in described.values()])
    if notes:
        manifest["notes"] = dict(notes)
    write_json_atomic(out, manifest)
    return manifest


def _follow(entry: DataSet, listing: TextIO, origins: Iterable[dict]) -> None:
    """List files whose change must prepare the set anew. Not those that a checksum pins, nor what
    was fetched and then copied: it may be deleted."""
    for file in origins:
        is_spare = entry.embed and Path(file["path"]).is_relative_to(DOWNLOADS)
        if not (entry.source or is_spare):
            listing.write(json.dumps(file) + "\n")


def _subset(rows: Rows, count: int) -> Rows:
    """So many of the rows, always the same ones, in their order."""
    total, stream = rows
    is_taken = np.zeros(total, bool)
    is_taken[np.random.default_rng(0).permutation(total)[:count]] = True
    return int(is_taken.sum()), compress(stream, is_taken.tolist())


def _check(
    name: str, source: str, splits: dict, reasons: dict, max_share: float, report: Path
) -> None:
    bad = sum(reasons.values())
    total = bad + sum(split["rows"] for split in splits.values())
    summary = f"{bad} of {total} rows of {source} are bad ({reasons}); all are listed in {report}"
    if total and bad / total > max_share:
        raise DataError(
            f"data set {name}: {summary}. That is above data.max_bad_share = {max_share}: correct "
            "the data or raise the limit"
        )
    empty = [split for split, described in splits.items() if not described["rows"]]
    if empty:
        raise DataError(f"data set {name}: no rows in {', '.join(empty)}; {summary}")


def _write(
    checked: Iterable[Checked],
    file: Path,
    bad: list[dict],
    notes: Counter[str],
    follow: Callable[[list[dict]], None],
) -> dict[str, Any]:
    """Write the good rows of a split, and give its entry in the manifest; the others are added to
    `bad`, what is odd about the good ones to `notes`, and `follow` gets the files of all. The hash
    is of texts and decoded pixels, so it doesn't depend on how images or tables are encoded."""
    split, digest = file.stem, hashlib.sha256()

    def good() -> Iterator[dict]:
        for index, (row, verdict, origins) in enumerate(checked):
            follow(origins)
            if isinstance(verdict, BadRow):
                where = {"split": split, "row": index, "id": row["id"]}
                bad.append(where | dict(zip(("reason", "detail"), verdict.args, strict=True)))
                continue
            images, odd = verdict
            notes.update(odd)
            texts = {key: value for key, value in row.items() if key not in ("image", "images")}
            shapes = [pixels.shape for _, pixels in images]
            if "images" not in row:
                shapes = next(iter(shapes), None)
            digest.update(json.dumps([texts, shapes], sort_keys=True).encode())
            for _, pixels in images:
                digest.update(pixels.tobytes())
            is_test = "question" in row
            cells = columns_of([cell for cell, _ in images], "images" in row)
            paths = {cell["path"] for cell, _ in images}
            held = {"origins": [file for file in origins if file["path"] in paths]}
            yield {**texts, **cells, **({} if is_test else held)}

    rows = good()
    first = list(islice(rows, 1))
    features = SEVERAL if first and "images" in first[0] else TRAINING
    features = BENCHMARK if split.startswith("test_") else features
    with ArrowWriter(features=features, path=str(file), writer_batch_size=CHUNK) as writer:
        for row in chain(first, rows):
            writer.write(row)
        count, _ = writer.finalize()
    return {"rows": count, "sha256": digest.hexdigest(), "file": file.name}


def _checked(rows: Iterable[dict], embed: bool, data: DataConfig) -> Iterator[Checked]:
    rows, check = iter(rows), partial(_check_row, embed, data.max_text_chars)
    with ThreadPoolExecutor(data.threads) as pool:
        while block := list(islice(rows, TOGETHER)):
            yield from pool.map(check, block)


def _check_row(embed: bool, max_chars: int, row: dict) -> Checked:
    images = images_of(row)
    origins = [origin(image) for image in images if isinstance(image, Path)]
    try:
        turns = _check_text(row, max_chars)
        odd = ["ASSISTANT: in an answer" for turn in turns[1::2] if "ASSISTANT:" in turn["value"]]
        return row, ([_image(image, embed, odd) for image in images], odd), origins
    except BadRow as error:
        return row, error, origins


def _check_text(row: dict, max_chars: int) -> list[dict]:
    """The turns of a row, if they are as they must be."""
    if "question" in row:
        row = conversation(row["id"], row["image"], [(row["question"], row["answer"])])
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns or not all(map(_is_turn, turns)):
        raise BadRow("malformed", "neither a list of {from, value} nor question and answer")
    try:
        "".join([row["id"], *(turn["value"] for turn in turns)]).encode()
    except UnicodeEncodeError as error:
        raise BadRow("malformed", f"half a character (a lone surrogate): {error}") from error
    roles = [turn["from"] for turn in turns]
    for role in roles:
        if role not in ROLES:
            raise BadRow("unknown role", f"{role!r}; known: {', '.join(ROLES)}")
    if roles != list(ROLES) * (len(turns) // 2):
        raise BadRow("wrong turn order", f"{', '.join(roles)}; must be human, gpt, human, gpt, ...")
    for number, turn in enumerate(turns):
        if turn["from"] == "gpt" and not turn["value"].strip():
            raise BadRow("empty answer", f"turn {number}")
        if len(turn["value"]) > max_chars:
            raise BadRow("text too long", f"turn {number}: {len(turn['value'])} > {max_chars}")
    counts = [turn["value"].count(IMAGE_TOKEN) for turn in turns]
    images = len(images_of(row))
    if sum(counts[::2]) != images or any(counts[1::2]):
        must = f"must be {images}, one for each image, in turns of a human"
        raise BadRow("wrong placeholders", f"{IMAGE_TOKEN} in turns: {counts}; {must}")
    return turns


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(k), str) for k in ("from", "value"))


def _image(image: Any, embed: bool, odd: list[str]) -> tuple[dict, np.ndarray]:
    """The table cell {bytes, path} of an image, and its pixels, uint8 [height, width, 3]; what is
    odd about its file is added to `odd`."""
    if isinstance(image, BadRow):
        raise image
    if not isinstance(image, Path | bytes):
        picture = rgb(image if isinstance(image, Image.Image) else Image.fromarray(image))
        png = io.BytesIO()
        picture.save(png, "PNG")
        return {"bytes": png.getvalue(), "path": None}, np.asarray(picture)
    is_file = isinstance(image, Path)
    name = f"{image}: " if is_file else ""
    try:
        if is_file and not image.is_file():
            raise BadRow("missing image", str(image))
    except (OSError, UnicodeError) as error:  # a closed folder, a name that none can have
        raise BadRow("missing image", f"{name}{error}") from error
    try:
        with Image.open(image if is_file else io.BytesIO(image)) as picture:
            _check_size(*picture.size)
            kind, pixels = picture.format, np.asarray(rgb(picture))
            if is_deep(picture):
                odd.append(f"{picture.mode} grey, scaled to 8 bits")
    except (BadRow, *BROKEN_IMAGE) as error:
        reason = "unusable size" if isinstance(error, (BadRow, *BOMB)) else "corrupt image"
        raise BadRow(reason, f"{name}{error}") from error
    if is_file and kind != Image.registered_extensions().get(image.suffix.lower()):
        odd.append(f"{kind} named {image.suffix}")
    if is_file and not embed:
        return {"bytes": None, "path": str(image)}, pixels
    return {"bytes": image.read_bytes() if is_file else image, "path": None}, pixels


def _check_size(width: int, height: int) -> None:
    pixels = Image.MAX_IMAGE_PIXELS or width * height
    if width * height > pixels:
        raise BadRow(f"{width} x {height} are more than {pixels} pixels")
    if max(width, height) > LONGEST * min(width, height):
        raise BadRow(f"{width} x {height}: one side is more than {LONGEST} times the other")
