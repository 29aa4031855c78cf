"""The data sets: version, licence, source, checksum, splits, citation, and how each is read.

A new set is one entry of `REGISTRY` and one function. What a loader gives for a split is a count
(for the progress bar) and an iterator of rows:

training split    {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}
test_<benchmark>  {"id", "image", "question", "answer", "form"}

An image is a path, a PIL image, a uint8 array [height, width, 3], or None. `form` groups questions
that have the same possible answers.
"""

import hashlib
import http.client
import json
import os
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageOps
from tqdm import tqdm

from sts.mini import scenes
from sts.pipeline.config import Config, CustomConfig, DataConfig
from sts.pipeline.provenance import sha256_file

DOWNLOADS = Path("data/raw")
CLIP_MEAN = (122, 116, 104)  # 255 x CLIP's mean colour; LLaVA-1.5 pads images to a square with it

# what PIL raises for a damaged image; SyntaxError is a broken PNG chunk
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

Rows = tuple[int, Iterable[dict]]
Questions = dict[str, list[dict]]  # split -> {"id", "image": Path, "question", "answer"}


class DataError(RuntimeError):
    """Data that can't be had or used; the message says which, where, and what to do."""


@dataclass(frozen=True)
class Source:
    """The files of a public data set."""

    archive: str
    """URL of a .tar.gz of one commit."""
    folder: str
    """The part of the archive that is used."""
    files: int
    """Files in that part, for the progress bar."""
    mirror: str
    """Name of the folder in a mirror."""
    sha256: str
    """Of the texts and image files that are read (`checksum`)."""
    read: Callable[[Path], Questions]
    """The questions in a folder of either layout."""


@dataclass(frozen=True)
class DataSet:
    """One entry of the registry."""

    version: str
    licence: str
    homepage: str
    citation: str
    splits: tuple[str, ...]
    load: Callable[[DataConfig, Any], dict[str, Rows]]
    """Split -> rows, from the configuration and what the source gave (None if there is none)."""
    source: Source | None = None
    embed: bool = True
    """Image files are copied into the prepared data; else these hold their paths."""


def load(config: Config, name: str) -> tuple[DataSet, dict[str, Rows]]:
    """The entry of a data set and its rows by split; files are fetched and checked first.

    Raises DataError for an unknown name, files that can't be had, and files that are damaged.
    """
    entry = _lookup(config.data, name)
    questions = _read(name, entry.source, config.data.mirror) if entry.source else None
    return entry, entry.load(config.data, questions)


def _lookup(data: DataConfig, name: str) -> DataSet:
    if name in REGISTRY:
        return REGISTRY[name]
    if name not in data.custom:
        raise DataError(
            f"no data set {name!r}. There are: {', '.join([*REGISTRY, *data.custom])}. "
            "Your own is an entry of data.custom in the scale file"
        )
    spec = data.custom[name]
    return DataSet(
        version="custom",
        licence="not stated",
        homepage=spec.json_file,
        citation="",
        splits=(spec.split,),
        load=partial(_custom, name, spec),
        embed=False,
    )


# --- files: mirror, download, checksum ---


def _read(name: str, source: Source, mirror: str | None) -> Questions:
    folder = locate(name, source, mirror)
    try:
        questions = source.read(folder)
        found = checksum(questions)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"data set {name}: {folder} can't be read: {error}. {_FRESH_COPY}"
        ) from error
    if found != source.sha256:
        damaged = [str(path) for path in _images(questions) if not _opens(path)]
        raise DataError(
            f"data set {name}: the files in {folder} are not those of the registry: checksum "
            f"{found}, expected {source.sha256}; images that don't open: "
            f"{', '.join(damaged[:3]) or 'none'}. {_FRESH_COPY}"
        )
    return questions


_FRESH_COPY = "Delete that folder (or set STS_DATA_MIRROR to a good copy) and run again"


def locate(name: str, source: Source, mirror: str | None) -> Path:
    """The folder with a set's files: in the mirror, else downloaded before, else downloaded now.

    The variable STS_DATA_MIRROR wins over `mirror`. Raises DataError.
    """
    mirror = os.environ.get("STS_DATA_MIRROR") or mirror
    if mirror and not Path(mirror).is_dir():
        raise DataError(
            f"the data mirror {mirror} is not a folder. Correct STS_DATA_MIRROR or data.mirror"
        )
    if mirror and (copy := Path(mirror) / source.mirror).is_dir():
        return copy
    downloaded = DOWNLOADS / name
    if not downloaded.is_dir():
        download(name, source, downloaded)
    return downloaded


def download(name: str, source: Source, folder: Path) -> None:
    """Fetch the used part of the source's archive into `folder`, all of it or nothing.

    Raises DataError with the URL and both ways out when it can't.
    """
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        with urllib.request.urlopen(source.archive, timeout=60) as response:
            members = _members(response, source.folder)
            members = tqdm(members, f"download {name}", source.files, unit="file", disable=None)
            for path, content in members:
                (part / path).parent.mkdir(parents=True, exist_ok=True)
                (part / path).write_bytes(content)
        os.replace(part, folder)
    except (OSError, EOFError, http.client.HTTPException, tarfile.TarError, zlib.error) as error:
        raise DataError(
            f"data set {name}: {source.archive} can't be downloaded: {error}. Go online, or set "
            f"STS_DATA_MIRROR (or data.mirror) to a folder that holds {source.mirror}/"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _members(stream: Any, folder: str) -> Iterator[tuple[PurePosixPath, bytes]]:
    """(path inside `folder`, content) of the files of a .tar.gz stream.

    GitHub's archives are sorted, so what comes after the folder need not be fetched.
    """
    found = False
    with tarfile.open(fileobj=stream, mode="r|gz") as archive:
        for member in archive:
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])  # without <repo>-<commit>
            if path.is_relative_to(folder) and ".." not in path.parts:
                found = True
                if member.isfile():
                    yield path.relative_to(folder), archive.extractfile(member).read()
            elif found:
                return
    if not found:
        raise tarfile.TarError(f"the archive has no folder {folder}")


def checksum(questions: Questions) -> str:
    """SHA-256 of all that is used: ids, texts and the bytes of the image files, in order.

    It doesn't depend on where or in what layout the files lie.
    """
    digest, file_digest = hashlib.sha256(), cache(sha256_file)
    for split, items in questions.items():
        for item in items:
            fields = [split, item["id"], item["question"], item["answer"]]
            digest.update(json.dumps([*fields, file_digest(item["image"])]).encode())
    return digest.hexdigest()


def _images(questions: Questions) -> dict[Path, None]:
    return dict.fromkeys(item["image"] for items in questions.values() for item in items)


def _opens(path: Path) -> bool:
    try:
        Image.open(path).convert("RGB")
    except BROKEN_IMAGE:
        return False
    return True


# --- scenes ---


def _scenes(data: DataConfig, _: None) -> dict[str, Rows]:
    size, seed = data.scenes, data.scenes.seed
    splits = {
        "align": (size.align, map(_captioned, scenes.rows("align", size.align, seed))),
        "instruct": (size.instruct, map(_asked, scenes.rows("instruct", size.instruct, seed))),
    }
    for skill in scenes.SKILLS:
        splits[f"test_{skill}"] = (size.test, _benchmark(skill, size.test, seed))
    return splits


def _captioned(row: dict) -> dict:
    return _conversation(row["id"], row["image"], [(scenes.CAPTION_REQUEST, row["caption"])])


def _asked(row: dict) -> dict:
    pairs = [(qa["question"], qa["answer"]) for qa in row["qa"]]
    return _conversation(row["id"], row["image"], pairs)


def _benchmark(skill: str, count: int, seed: int) -> Iterator[dict]:
    yield from scenes.benchmark(skill, count, seed)  # drawn when the split is written, not before


def _conversation(id: str, image: Any, pairs: Iterable[tuple[str, str]]) -> dict:
    turns = []
    for question, answer in pairs:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": id, "image": image, "conversations": turns}


# --- easy-VQA ---


def _read_easy_vqa(folder: Path) -> Questions:
    questions = {}
    for split in ("train", "test"):
        triples = json.loads((folder / split / "questions.json").read_text(encoding="utf-8"))
        questions[split] = [
            {
                "id": f"{split}-{index:05d}",
                "image": folder / split / "images" / f"{image}.png",
                "question": question,
                "answer": answer,
            }
            for index, (question, answer, image) in enumerate(triples)
        ]
    return questions


def _easy_vqa(_: DataConfig, questions: Questions) -> dict[str, Rows]:
    """Training rows hold all questions of an image, as LLaVA-1.5 joins those of VQAv2."""
    by_image: dict[Path, list[dict]] = {}
    for item in questions["train"]:
        by_image.setdefault(item["image"], []).append(item)
    train = (
        _conversation(f"train-{image.stem}", image, [(i["question"], i["answer"]) for i in items])
        for image, items in by_image.items()
    )
    test = ({**item, "form": _easy_vqa_form(item["question"])} for item in questions["test"])
    return {
        "instruct": (len(by_image), train),
        "test_easy_vqa": (len(questions["test"]), test),
    }


def _easy_vqa_form(question: str) -> str:
    if not question.startswith("what"):
        return "yes_no"
    return "colour" if "color" in question else "shape"


# --- NLVR ---


def _read_nlvr(folder: Path) -> Questions:
    """The public layout (dev.json, images/<directory>/) or the mirror's (dev.jsonl with paths).

    Of the six orders of the boxes of each example, the first is used.
    """
    public = folder / "dev.json"
    lines = (public if public.exists() else folder / "dev.jsonl").read_text(encoding="utf-8")
    questions = []
    for example in map(json.loads, lines.splitlines()):
        id = example["identifier"]
        image = example.get("image") or f"images/{example['directory']}/dev-{id}-0.png"
        sentence = example["sentence"].strip().rstrip(".")
        questions.append(
            {
                "id": f"dev-{id}",
                "image": folder / image,
                "question": f"{sentence}. true or false?",
                "answer": example["label"],
            }
        )
    return {"dev": questions}


def _nlvr(_: DataConfig, questions: Questions) -> dict[str, Rows]:
    """Asked as instruction data ask it, yes or no: a model that never answered "true" won't."""
    said = {"true": "yes", "false": "no"}
    rows = (
        {
            **item,
            "question": item["question"].replace("true or false?", "yes or no?"),
            "answer": said[item["answer"]],
            "image": _squared(item["image"]),
            "form": "yes_no",
        }
        for item in questions["dev"]
    )
    return {"test_nlvr": (len(questions["dev"]), rows)}


def _squared(path: Path) -> Image.Image:
    """The image in the middle of a square: CLIP's centre crop would cut a wide strip's ends off."""
    with Image.open(path) as image:
        side = max(image.size)
        return ImageOps.pad(image.convert("RGB"), (side, side), color=CLIP_MEAN)


# --- a user's own data ---


def _custom(name: str, spec: CustomConfig, _: DataConfig, __: None) -> dict[str, Rows]:
    file = Path(spec.json_file)
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"data set {name}: {file} can't be read: {error}. Correct data.custom.{name}.json"
        ) from error
    if not isinstance(rows, list):
        raise DataError(
            f"data set {name}: {file} holds a {type(rows).__name__}, not a list of "
            "{id, image, conversations}"
        )
    images = Path(spec.images)
    if not images.is_dir():
        raise DataError(
            f"data set {name}: {images} is not a folder. Correct data.custom.{name}.images"
        )
    return {spec.split: (len(rows), (_custom_row(row, i, images) for i, row in enumerate(rows)))}


def _custom_row(row: Any, index: int, images: Path) -> dict:
    """A row as it stands, malformed or not: `prepare` judges it and reports the index."""
    row = row if isinstance(row, dict) else {}
    image = row.get("image")
    return {
        "id": str(row.get("id", index)),
        "image": images / str(image) if image is not None else None,
        "conversations": row.get("conversations"),
    }


REGISTRY: dict[str, DataSet] = {
    "scenes": DataSet(
        version=scenes.VERSION,
        licence="Apache-2.0",
        homepage="sts/mini/scenes.py",
        citation="Generated by this project.",
        splits=("align", "instruct", *(f"test_{skill}" for skill in scenes.SKILLS)),
        load=_scenes,
    ),
    "easy_vqa": DataSet(
        version="1.0",
        licence="MIT",
        homepage="https://github.com/vzhou842/easy-VQA",
        citation="Victor Zhou. easy-VQA: an easy visual question answering dataset. 2019.",
        splits=("instruct", "test_easy_vqa"),
        load=_easy_vqa,
        source=Source(
            archive="https://github.com/vzhou842/easy-VQA/archive/"
            "3b553bb7ff42a868d5f4cbe8c88255d7333c3c31.tar.gz",
            folder="easy_vqa/data",
            files=5004,
            mirror="easy_vqa",
            sha256="c5723668feb2e39a48a65f62ea7465a5a1517ad7c038a7a3117fc19f6b24ea7f",
            read=_read_easy_vqa,
        ),
    ),
    "nlvr": DataSet(
        version="1.0",
        licence="CC-BY-4.0",
        homepage="https://github.com/lil-lab/nlvr",
        citation="Alane Suhr, Mike Lewis, James Yeh, Yoav Artzi. A Corpus of Natural Language for "
        "Visual Reasoning. ACL 2017. doi:10.18653/v1/P17-2034",
        splits=("test_nlvr",),
        load=_nlvr,
        source=Source(
            archive="https://github.com/lil-lab/nlvr/archive/"
            "18924841aa96d519cfb8584f0945350f07a6d860.tar.gz",
            folder="nlvr/dev",
            files=5935,
            mirror="nlvr_dev",
            sha256="6f051918e9c20e18afb6844535166d6e0338cf938960d5939b882d041434f98f",
            read=_read_nlvr,
        ),
    ),
}
