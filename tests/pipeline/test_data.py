"""Data sets are found, checked, prepared and batched; what is wrong with them is said."""

import csv
import dataclasses
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from cases import turns
from own_sets import config, rows_of, samples_of, write
from PIL import Image
from processors import tiny_processor

from sts.mini import pictures, scenes
from sts.mini.sets.scenes import TURNS
from sts.pipeline.config import Config, datasets
from sts.pipeline.data import fetch, source
from sts.pipeline.data.collator import batch_indices, batch_order, collate, split_files
from sts.pipeline.data.origins import state
from sts.pipeline.data.prepare import prepare
from sts.pipeline.data.registry import dataset
from sts.pipeline.data.sets import easy_vqa, nlvr
from sts.pipeline.data.source import DataError
from sts.pipeline.data.templates import CHAT_TEMPLATE
from sts.pipeline.data.tokens import expand, tokenise
from sts.pipeline.files import read_json
from sts.pipeline.measure.kept_tokens import bright_picture
from sts.settings import IGNORE_INDEX

ROOT = Path(__file__).resolve().parents[2]
MIRROR = os.environ.get("STS_DATA_MIRROR")
PREPARED = {
    "easy_vqa": "5ab2f3bb6eeec6ffb2ec17bd87afc0df511ca044a6c5ffeeaf1ec2f3b7e73047",
    "nlvr": "081aa2f467d9f527dac0be07301bfab89dd979cfcad55c620c2f861573d41a0c",
}  # sha256 of their manifests
SCENES = {"seed": 3, "align": 12, "instruct": 10, "validation": 1, "test": 8}


@pytest.fixture(autouse=True)
def no_mirror_no_downloads(monkeypatch, tmp_path):
    monkeypatch.delenv("STS_DATA_MIRROR", raising=False)
    monkeypatch.setattr(source, "DOWNLOADS", tmp_path / "raw")


@pytest.fixture(scope="session")
def processor():
    processor = tiny_processor()
    processor.chat_template = CHAT_TEMPLATE
    return processor


# --- the sets ---


@pytest.mark.parametrize("name", datasets())
def test_an_entry_says_where_a_set_comes_from_and_under_what_terms(name):
    entry = dataset(name, config().data)
    assert entry.version and entry.licence and entry.citation and entry.homepage
    if entry.source:
        assert re.search(r"/[0-9a-f]{40}\.tar\.gz$", entry.source.archive)  # one commit
        assert re.fullmatch("[0-9a-f]{64}", entry.source.sha256)


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path):
    own = config(custom={"mine": {"json": "a.json", "images": "."}})
    with pytest.raises(
        DataError,
        match=r"no data set 'scnes'.*scenes, easy_vqa, .*nlvr, mine",
    ):
        prepare(own, "scnes", tmp_path / "manifest.json")


def test_a_new_set_is_the_one_file_that_the_page_shows(tmp_path):
    """Written as the page says, it is trained and evaluated on by its name, and prepared."""
    page = (ROOT / "docs/data.md").read_text()
    shown = r"`(sts/pipeline/[\w/]+\.\w+)`:\n\n```\w+\n(.*?)```"
    files = dict(re.findall(shown, page, re.DOTALL))
    assert list(files) == ["sts/pipeline/data/sets/stripes.py", "sts/pipeline/tasks/stripes.yaml"]
    shutil.copytree(ROOT / "sts", tmp_path / "sts")
    shutil.copytree(ROOT / "workflow", tmp_path / "workflow")
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    scale = "{stages: {instruct: {data: [stripes]}}, evaluate: {benchmarks: [stripes]}}"
    (tmp_path / "scale.yaml").write_text(scale)
    out = tmp_path / "manifest.json"
    verb = ["prepare", "--config", "scale.yaml", "--dataset", "stripes", "--out", out]
    subprocess.run([sys.executable, "-m", "sts", *verb], cwd=tmp_path, check=True)
    assert json.loads(out.read_text())["bad_rows"] == {}
    train, test = rows_of(out, "instruct"), rows_of(out, "test_stripes")
    for index, answer in enumerate(["lying", "standing"]):
        assert train[index]["conversations"][1] == {"from": "gpt", "value": answer}
        pixels = np.asarray(test[index]["image"]).swapaxes(0, index)  # as if lying
        assert (pixels == pixels[:, :1]).all() and len(np.unique(pixels, axis=0)) == 2


@pytest.mark.slow
@pytest.mark.skipif(not MIRROR, reason="STS_DATA_MIRROR is not set")
@pytest.mark.parametrize("name", ["easy_vqa", "nlvr"])
def test_the_real_sets_prepare_without_a_bad_row(name, tmp_path):
    manifest = prepare(config(mirror=MIRROR), name, tmp_path / "manifest.json")
    assert manifest["bad_rows"] == {}
    assert manifest["sha256"] == PREPARED[name]
    rows = {split: described["rows"] for split, described in manifest["splits"].items()}
    assert (
        rows
        == {
            "easy_vqa": {"instruct": 4000, "test_easy_vqa": 9673},
            "nlvr": {"test_nlvr": 989},
        }[name]
    )


def picture(shade: int, size: tuple[int, int] = (8, 8)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (shade, 10, 20)).save(content, "PNG")
    return content.getvalue()


EASY_VQA = {
    "train/questions.json": json.dumps(
        [["what color is the shape?", "red", 0], ["is there a circle?", "no", 0],
         ["what shape is present?", "circle", 1]]
    ).encode(),
    "test/questions.json": json.dumps(
        [["what color is the shape?", "red", 0], ["is there a circle?", "no", 0],
         ["what shape is present?", "circle", 0]]
    ).encode(),
    "train/images/0.png": picture(200),
    "train/images/1.png": picture(100),
    "test/images/0.png": picture(50),
}  # fmt: skip
NLVR_IMAGE = picture(200, (40, 10))
NLVR_PUBLIC = {
    "dev.json": b'{"sentence": "There is a box.", "label": "true", "identifier": "7-0", '
    b'"directory": "3", "evals": {"r0": "true"}}\n',
    "images/3/dev-7-0-0.png": NLVR_IMAGE,
    "images/3/dev-7-0-1.png": picture(9),
}
NLVR_MIRROR = {
    "dev.jsonl": b'{"image": "images/dev-7-0-0.png", "sentence": "There is a box.", '
    b'"label": "true", "identifier": "7-0"}\n',
    "images/dev-7-0-0.png": NLVR_IMAGE,
}


@pytest.fixture
def tiny_source(monkeypatch, tmp_path):
    """Puts the checksum of a small stand-in for a public set into its entry."""

    def install(module: ModuleType, files: dict[str, bytes], **changes) -> None:
        entry = module.DATASET
        original = write(tmp_path / "original", files)
        sha256 = source.checksum(entry.load(config().data, original))
        files_of = dataclasses.replace(entry.source, sha256=sha256, **changes)
        monkeypatch.setattr(module, "DATASET", dataclasses.replace(entry, source=files_of))

    return install


def test_easy_vqa_is_read_from_the_mirror(tiny_source, tmp_path):
    tiny_source(easy_vqa, EASY_VQA)
    write(tmp_path / "mirror" / "easy_vqa", EASY_VQA)
    out = tmp_path / "out" / "manifest.json"
    manifest = prepare(config(mirror=str(tmp_path / "mirror")), "easy_vqa", out)
    assert manifest["licence"] == "MIT"
    # all questions of an image are one conversation, and the first names the image
    first, second = rows_of(out, "instruct")["conversations"]
    assert [turn["value"] for turn in first] == [
        "<image>\nwhat color is the shape?", "red", "is there a circle?", "no",
    ]  # fmt: skip
    assert len(second) == 2
    test = rows_of(out, "test_easy_vqa")
    assert test["form"] == ["colour", "yes_no", "shape"]
    assert test[0]["image"].getpixel((0, 0)) == (50, 10, 20)


def test_nlvr_has_one_checksum_in_both_layouts(tmp_path):
    folders = write(tmp_path / "a", NLVR_PUBLIC), write(tmp_path / "b", NLVR_MIRROR)
    rows = [nlvr.DATASET.load(config().data, folder) for folder in folders]
    assert source.checksum(rows[0]) == source.checksum(rows[1])


def test_another_nlvr_is_refused(tiny_source, tmp_path):
    """Its rows hold pictures, not files."""
    tiny_source(nlvr, NLVR_PUBLIC)
    write(tmp_path / "mirror" / "nlvr_dev", NLVR_MIRROR | {"images/dev-7-0-0.png": picture(9)})
    with pytest.raises(DataError, match="not those of its entry"):
        prepare(config(mirror=str(tmp_path / "mirror")), "nlvr", tmp_path / "manifest.json")


def test_nlvr_asks_yes_or_no_about_the_whole_strip(tiny_source, tmp_path):
    tiny_source(nlvr, NLVR_PUBLIC)
    write(tmp_path / "mirror" / "nlvr_dev", NLVR_MIRROR)
    out = tmp_path / "out" / "manifest.json"
    prepare(config(mirror=str(tmp_path / "mirror")), "nlvr", out)
    [row] = rows_of(out, "test_nlvr")
    assert (row["question"], row["answer"]) == ("There is a box. yes or no?", "yes")
    pixels = np.asarray(row["image"])
    assert pixels.shape == (40, 40, 3)  # a square, so that a centre crop keeps both ends
    assert (pixels[15:25] == (200, 10, 20)).all() and (pixels[:15] == nlvr.CLIP_MEAN).all()


def test_the_variable_wins_over_the_configured_mirror(tiny_source, tmp_path, monkeypatch):
    tiny_source(nlvr, NLVR_PUBLIC)
    write(tmp_path / "good" / "nlvr_dev", NLVR_MIRROR)
    monkeypatch.setenv("STS_DATA_MIRROR", str(tmp_path / "good"))
    manifest = prepare(config(mirror="/nowhere"), "nlvr", tmp_path / "manifest.json")
    assert manifest["splits"]["test_nlvr"]["rows"] == 1


def test_a_mirror_that_is_not_there_is_an_error_not_a_download(tmp_path):
    with pytest.raises(DataError, match=r"/nowhere is not a folder.*STS_DATA_MIRROR"):
        prepare(config(mirror="/nowhere"), "nlvr", tmp_path / "manifest.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"train/images/1.png": EASY_VQA["train/images/1.png"][:40]}, r"1\.png"),
        ({"train/images/1.png": picture(101)}, r"not those of its entry.*don't open: none"),
        ({"test/questions.json": b'[["what"'}, r"easy_vqa can't be read.*line 1"),
        ({"test/questions.json": b'[["what", "red"]]'}, r"easy_vqa can't be read"),
        ({"train/images/0.png": None}, r"can't be read: .*0\.png"),
    ],
)
def test_damaged_files_stop_with_their_place_and_the_fix(tiny_source, tmp_path, damage, message):
    tiny_source(easy_vqa, EASY_VQA)
    files = {name: content for name, content in {**EASY_VQA, **damage}.items() if content}
    write(tmp_path / "mirror" / "easy_vqa", files)
    with pytest.raises(DataError, match=message) as error:
        prepare(config(mirror=str(tmp_path / "mirror")), "easy_vqa", tmp_path / "manifest.json")
    assert "data set easy_vqa" in str(error.value) and "run again" in str(error.value)
    assert not (tmp_path / "manifest.json").exists()


# --- downloads ---


def archive(files: dict[str, bytes]) -> bytes:
    """A .tar.gz as GitHub makes it: sorted, below a folder named after the commit."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name in sorted(files):
            member = tarfile.TarInfo(f"repo-0123abc/{name}")
            member.size = len(files[name])
            tar.addfile(member, io.BytesIO(files[name]))
    return content.getvalue()


NLVR_ARCHIVE = archive(
    {"README.md": b"x", "nlvr/train/train.json": b"x", "nlvr/a": b"x"}
    | {f"nlvr/dev/{name}": content for name, content in NLVR_PUBLIC.items()}
)


@pytest.fixture
def serve(tmp_path):
    """Serves bytes at a local URL, as the public source would."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def at(content: bytes) -> str:
            (folder / "archive.tar.gz").write_bytes(content)
            return f"http://127.0.0.1:{server.server_port}/archive.tar.gz"

        yield at
        server.shutdown()


def test_without_a_mirror_the_pinned_archive_is_downloaded_once(tiny_source, serve, tmp_path):
    tiny_source(nlvr, NLVR_PUBLIC, archive=serve(NLVR_ARCHIVE))
    first = prepare(config(), "nlvr", tmp_path / "a" / "manifest.json")
    assert first["splits"]["test_nlvr"]["rows"] == 1
    stored = {p.name for p in (tmp_path / "raw" / "nlvr").rglob("*") if p.is_file()}
    assert stored == {"dev.json", "dev-7-0-0.png", "dev-7-0-1.png"}  # the used folder only
    serve(b"gone")
    assert prepare(config(), "nlvr", tmp_path / "b" / "manifest.json") == first


def test_what_an_archive_holds_after_the_folder_is_not_fetched():
    """NLVR's training images are 20 times as large as what is used."""
    stream = io.BytesIO(archive({"nlvr/dev/dev.json": b"x", "nlvr/train": os.urandom(2_000_000)}))
    with tarfile.open(fileobj=stream, mode="r|gz") as content:
        assert [member.name for member in source._members(content, "nlvr/dev")] == ["dev.json"]
    assert stream.tell() < 100_000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (NLVR_ARCHIVE[: len(NLVR_ARCHIVE) // 2], ""),
        (b"<html>sorry</html>", ""),
        (archive({"nlvr/README.md": b"x"}), "no folder nlvr/dev"),
    ],
    ids=["cut off", "not an archive", "other content"],
)
def test_a_bad_download_leaves_nothing_behind(tiny_source, serve, tmp_path, content, reason):
    tiny_source(nlvr, NLVR_PUBLIC, archive=serve(content))
    with pytest.raises(DataError, match=f"can't be downloaded: .*{reason}"):
        prepare(config(), "nlvr", tmp_path / "manifest.json")
    assert list((tmp_path / "raw").iterdir()) == []


def test_an_archive_member_can_not_leave_the_folder(tiny_source, serve, tmp_path):
    evil = archive({"nlvr/dev/../../evil": b"x", "nlvr/dev/dev.json": NLVR_PUBLIC["dev.json"]})
    tiny_source(nlvr, NLVR_PUBLIC, archive=serve(evil))
    with pytest.raises(DataError):
        prepare(config(), "nlvr", tmp_path / "manifest.json")
    assert not list(tmp_path.rglob("evil"))


def test_an_archive_that_unpacks_to_too_much_is_refused(tiny_source, serve, tmp_path, monkeypatch):
    tiny_source(nlvr, NLVR_PUBLIC, archive=serve(NLVR_ARCHIVE))
    monkeypatch.setattr(source, "MOST_BYTES", 100)
    with pytest.raises(DataError, match=r"more than .* 100 bytes"):
        prepare(config(), "nlvr", tmp_path / "manifest.json")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("zeros", bytes(1_000_000))
    with pytest.raises(OSError, match=r"bomb\.zip unpacks to 1 files of 1000000 bytes"):
        fetch.unpack(tmp_path / "bomb.zip", tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists() and list((tmp_path / "raw").iterdir()) == []


def test_offline_without_a_mirror_one_error_names_set_source_and_both_fixes(tiny_source, tmp_path):
    tiny_source(nlvr, NLVR_PUBLIC, archive="http://127.0.0.1:9/nlvr.tar.gz")  # nobody listens
    with pytest.raises(DataError) as error:
        prepare(config(), "nlvr", tmp_path / "manifest.json")
    for part in ("data set nlvr", "http://127.0.0.1:9/nlvr.tar.gz", "Go online", "STS_DATA_MIRROR"):
        assert part in str(error.value)


# --- scenes ---


@pytest.fixture(scope="module")
def prepared_scenes(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "manifest.json"
    prepare(config(scenes=SCENES), "scenes", out)
    return out


def test_scenes_has_its_splits_in_the_configured_sizes(prepared_scenes):
    manifest = json.loads(prepared_scenes.read_text())
    sizes = {split: described["rows"] for split, described in manifest["splits"].items()}
    tests = dict.fromkeys([f"test_{skill}" for skill in scenes.SKILLS], 8)
    assert sizes == {"align": 12, "instruct": 10, "validation": len(scenes.SKILLS), **tests}
    assert manifest["bad_rows"] == {}
    assert sorted(p.name for p in prepared_scenes.parent.iterdir()) == sorted(
        ["manifest.json", "bad_rows.jsonl", "origins.jsonl", *(f"{split}.arrow" for split in sizes)]
    )


def test_align_asks_for_the_caption_and_instruct_asks_every_question(prepared_scenes):
    for row, scene in zip(
        rows_of(prepared_scenes, "align"), scenes.rows("align", 12, 3), strict=True
    ):
        assert [turn["value"] for turn in row["conversations"]] == [
            "<image>\ndescribe the image.", scene["caption"],
        ]  # fmt: skip
        assert np.array_equal(np.asarray(row["image"]), scene["image"])
    for row, scene in zip(
        rows_of(prepared_scenes, "instruct"), scenes.rows("instruct", 10, 3, TURNS), strict=True
    ):
        assert len(row["conversations"]) == 2 * len(scene["qa"]) > 0
        assert row["conversations"][-1]["value"] == scene["qa"][-1]["answer"]


def test_the_manifest_is_a_function_of_the_configuration(prepared_scenes, tmp_path):
    again, other = tmp_path / "again" / "manifest.json", tmp_path / "other" / "manifest.json"
    prepare(config(scenes=SCENES), "scenes", again)
    assert again.read_bytes() == prepared_scenes.read_bytes()
    prepare(config(scenes={**SCENES, "seed": 4}), "scenes", other)
    assert json.loads(other.read_text())["sha256"] != json.loads(again.read_text())["sha256"]


# --- a user's own data, good and bad ---


GOOD = [
    {"id": "photo", "image": "a.png", "conversations": turns("<image>\nwhat?", "a dog")},
    {
        "id": 2,
        "image": "sub/b.jpg",
        "conversations": turns("what?\n<image>", "a cat", "sure?", "yes"),
    },
    {"id": "text", "conversations": turns("hello", "hello")},
]


HUGE = picture(4).replace(b"\0\0\0\x08\0\0\0\x08", b"\0\0\x40\0\0\0\x40\0")  # by its header


@pytest.fixture
def own(tmp_path):
    """Writes rows and images of a user's data set; gives its configuration."""

    def make(rows, **data) -> Config:
        images = tmp_path / "images"
        write(images, {"a.png": picture(1), "broken.png": picture(2)[:50], "text.png": b"hello"})
        write(images, {"thread.png": picture(3, (201, 1)), "huge.png": HUGE})
        (images / "sub").mkdir(exist_ok=True)
        Image.new("L", (20, 10), 77).save(images / "sub" / "b.jpg")
        file = tmp_path / "own.json"
        file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
        return config(custom={"own": {"json": str(file), "images": str(images)}}, **data)

    return make


def test_a_llava_json_file_and_an_image_folder_are_one_more_data_set(own, tmp_path):
    out = tmp_path / "out" / "manifest.json"
    manifest = prepare(own(GOOD), "own", out)
    assert manifest["splits"]["instruct"]["rows"] == 3 and manifest["bad_rows"] == {}
    photo, grey, text = rows_of(out, "instruct")
    assert photo["conversations"] == GOOD[0]["conversations"]
    assert grey["id"] == "2" and grey["image"].size == (20, 10)
    assert text["image"] is None


SEVERAL = [
    {"id": "pair", "image": ["a.png", "sub/b.jpg"],
     "conversations": turns("<image> or <image>?", "both", "sure?", "yes")},
    {"id": "later", "image": "a.png", "conversations": turns("ready?", "yes", "<image>", "a dog")},
    {"id": "text", "conversations": turns("hello", "hello")},
]  # fmt: skip


def test_a_row_may_have_several_images(own, tmp_path):
    out = tmp_path / "out" / "manifest.json"
    assert prepare(own(SEVERAL), "own", out)["bad_rows"] == {}
    rows = rows_of(out, "instruct")
    assert rows["conversations"] == [row["conversations"] for row in SEVERAL]
    assert [[image.size for image in row["images"]] for row in rows] == [
        [(8, 8), (20, 10)],
        [(8, 8)],
        [],
    ]


def test_the_content_hash_follows_every_image_of_a_row(own, tmp_path):
    hashes = set()
    for names in (["a.png", "sub/b.jpg"], ["sub/b.jpg", "a.png"], ["a.png", "a.png"]):
        manifest = prepare(own([{**SEVERAL[0], "image": names}]), "own", tmp_path / "manifest.json")
        hashes.add(manifest["splits"]["instruct"]["sha256"])
    assert len(hashes) == 3


BAD = {
    "missing image": {"image": "nowhere.png", "conversations": turns("<image>", "x")},
    "corrupt image": {"image": "broken.png", "conversations": turns("<image>", "x")},
    "empty answer": {"conversations": turns("hello", " \n")},
    "unknown role": {"conversations": [{"from": "robot", "value": "x"}, *turns("x", "y")]},
    "text too long": {"conversations": turns("hello", "x" * 101)},
    "malformed": {"conversations": "hello"},
    "wrong turn order": {"conversations": turns("hello", "x", "unanswered")},
    "wrong placeholders": {"image": "a.png", "conversations": turns("no placeholder", "x")},
    "image outside": {"image": "../own.json", "conversations": turns("<image>", "x")},
    "unusable size": {"image": "thread.png", "conversations": turns("<image>", "x")},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_left_out_counted_and_listed(own, tmp_path, reason):
    out = tmp_path / "out" / "manifest.json"
    data = own([*GOOD, {"id": "culprit", **BAD[reason]}], max_bad_share=0.25, max_text_chars=100)
    manifest = prepare(data, "own", out)
    assert manifest["bad_rows"] == {reason: 1}
    assert rows_of(out, "instruct")["id"] == ["photo", "2", "text"]
    [listed] = map(json.loads, (out.parent / "bad_rows.jsonl").read_text().splitlines())
    assert (listed["id"], listed["reason"]) == ("culprit", reason)
    assert (listed["row"], listed["split"]) == (3, "instruct")


@pytest.mark.parametrize(
    ("conversation", "trained"),
    [
        (turns("<image> <image>\n what?", "x"), turns("<image>\nwhat?", "x")),
        ([{"from": "gpt", "value": "so"}, *turns("<image>", "x")], turns("<image>", "x")),
        (turns(" <image>\n what? \n", " x \n"), turns(" <image>\n what? \n", " x \n")),
    ],
)
def test_a_row_that_llava_trains_on_is_trained_on(own, tmp_path, conversation, trained):
    out = tmp_path / "manifest.json"
    row = {"id": "odd", "image": "a.png", "conversations": conversation}
    assert prepare(own([*GOOD, row]), "own", out)["bad_rows"] == {}
    assert rows_of(out, "instruct")["conversations"][-1] == trained


@pytest.mark.parametrize(
    "row",
    [
        17, {}, {"conversations": []}, {"conversations": [{"from": "human"}]},
        {"image": "text.png", "conversations": turns("<image>", "x")},
        {"image": "a.png", "conversations": turns("<image>", "x", "<image>", "y")},
        {"image": ["a.png"], "conversations": turns("hi", "x", "hi", "y")},
        {"image": ["a.png", "nowhere.png"], "conversations": turns("<image> <image>", "x")},
        {"image": ["a.png", None], "conversations": turns("<image> <image>", "x")},
        {"image": "a.png", "conversations": turns("<image>", "<image>")},
        {"conversations": turns("<image>", "x")},
        {"image": 5, "conversations": turns("<image>", "x")},
        {"conversations": turns("hi", "half \ud83d")},
        {"id": "\ud83d", "conversations": turns("a", "b")},
        {"image": "a\ud83d.png", "conversations": turns("<image>", "x")},
        {"image": "a\0b.png", "conversations": turns("<image>", "x")},
        {"image": "data:image/png;base64," + 400 * "A", "conversations": turns("<image>", "x")},
        {"image": "huge.png", "conversations": turns("<image>", "x")},
        {"image": "/etc/hostname", "conversations": turns("<image>", "x")},
        {"image": "sub/../../a.png", "conversations": turns("<image>", "x")},
        {"image": "a.png", "question": "what?"}, {"question": 5, "answer": "x"},
        {"image": "a.png", "question": "what?", "answer": None},
    ],
)  # fmt: skip
def test_whatever_a_row_holds_it_can_not_break_the_preparation(own, tmp_path, row):
    manifest = prepare(own([*GOOD, row], max_bad_share=0.25), "own", tmp_path / "manifest.json")
    assert sum(manifest["bad_rows"].values()) == 1


def test_paths_may_lead_out_of_the_folder_where_the_entry_says_so(tmp_path):
    write(tmp_path, {"a.png": picture(1), "own/b.png": picture(2)})
    (tmp_path / "own" / "link.png").symlink_to(tmp_path / "a.png")
    names = ["b.png", "./b.png", "../a.png", str(tmp_path / "a.png"), "link.png"]
    rows = [{"image": name, "question": "what?", "answer": "x"} for name in names]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    own = {"json": str(tmp_path / "own.json"), "images": str(tmp_path / "own")}
    for outside, bad in ((False, {"image outside": 3}), (True, {})):
        data = config(custom={"own": own | {"outside": outside}}, max_bad_share=1.0)
        assert prepare(data, "own", tmp_path / "out" / "manifest.json")["bad_rows"] == bad
        listed = (tmp_path / "out" / "bad_rows.jsonl").read_text()
        assert listed.count("`outside: true`") == sum(bad.values())


ASKED = [
    {"id": "1", "image": "a.png", "question": "what, and where?", "answer": 'a "dog"\nhere'},
    {"id": "2", "image": None, "question": "hello", "answer": "hello"},
]


def as_csv(separator: str) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ASKED[0], delimiter=separator)
    writer.writeheader()
    writer.writerows(ASKED)
    return text.getvalue()


FORMS = {
    "a.json": json.dumps(ASKED),
    "a.jsonl": "\n".join(map(json.dumps, ASKED)) + "\n\n",
    "a.csv": "\ufeff" + as_csv(","),
    "b.csv": as_csv(";"),
    "a.tsv": as_csv("\t"),
}


@pytest.mark.parametrize("name", FORMS)
def test_questions_and_answers_are_taken_in_any_form(tmp_path, name):
    write(tmp_path, {"a.png": picture(1), name: FORMS[name].encode()})
    key = "json" if "json" in name else "csv"
    data = config(custom={"own": {key: str(tmp_path / name), "images": str(tmp_path)}})
    assert prepare(data, "own", tmp_path / "manifest.json")["bad_rows"] == {}
    first, second = rows_of(tmp_path / "manifest.json", "instruct")
    assert first["conversations"] == turns("<image>\nwhat, and where?", 'a "dog"\nhere')
    assert first["id"] == "1" and first["image"].size == (8, 8) and second["image"] is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"image,caption\na.png,x\n", "without question and answer.*data.custom.own.csv"),
        ("a.csv", b"question,answer\n" + b"x" * 200_000 + b",y\n", "larger than field limit"),
        ("a.csv", b"question,answer\nwhat,is,it\n", "1 of 1 rows .*malformed"),
        ("a.csv", b"question,answer\nwhat\n", "1 of 1 rows .*malformed"),
        ("a.csv", b"question,answer\n\xe9,x\n", "utf-8.*data.custom.own.csv"),
        ("a.jsonl", b'{"question": "a", "answer": "b"}\n{"question"', "line 2 is no JSON.*after 1"),
        ("a.jsonl", b'[{"id": 1}]\n', "1 of 1 rows .*malformed"),
        ("a.json", "[1]".encode("utf-16"), "utf-8.*data.custom.own.json"),
        ("a.json", b'[{"id": ' + b"9" * 5000 + b"}]", "limit.*data.custom.own.json"),
        ("a.json", b"[" * 100_000 + b"]" * 100_000, "recursion.*data.custom.own.json"),
    ],
)
def test_what_no_file_of_rows_is_names_the_file_and_its_key(tmp_path, name, content, message):
    write(tmp_path, {name: content})
    key = "json" if "json" in name else "csv"
    data = config(custom={"own": {key: str(tmp_path / name), "images": str(tmp_path)}})
    with pytest.raises(DataError, match=message) as error:
        prepare(data, "own", tmp_path / "out" / "manifest.json")
    assert str(tmp_path / name) in str(error.value)


def test_too_many_bad_rows_stop_and_the_report_stays(own, tmp_path):
    out = tmp_path / "out" / "manifest.json"
    data = own([*GOOD, *BAD.values()], max_bad_share=0.5, max_text_chars=100)
    with pytest.raises(DataError, match=r"10 of 13 rows of .*own\.json.*data\.max_bad_share = 0"):
        prepare(data, "own", out)
    assert [p.name for p in out.parent.iterdir()] == ["bad_rows.jsonl"]
    assert len((out.parent / "bad_rows.jsonl").read_text().splitlines()) == len(BAD)


def test_a_failed_preparation_leaves_the_last_good_one_alone(own, tmp_path):
    out = tmp_path / "out" / "manifest.json"
    good = prepare(own(GOOD), "own", out)
    with pytest.raises(DataError):
        prepare(own([*GOOD, BAD["empty answer"]]), "own", out)
    assert read_json(out) == good
    assert len(rows_of(out, "instruct")) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1,', r"own\.json can't be read.*data\.custom\.own\.json"),
        ('{"id": 1}', r"own\.json can.t be read: it holds no list.*data\.custom\.own\.json"),
        ("[]", "no rows in instruct"),
    ],
)
def test_a_file_of_another_shape_is_named(own, tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        prepare(own(content), "own", tmp_path / "manifest.json")


def test_files_that_are_not_there_are_named_with_their_key(tmp_path):
    (tmp_path / "own.json").write_text("[]")
    for json_file, key in (
        (str(tmp_path / "no.json"), "json"),
        (str(tmp_path / "own.json"), "images"),
    ):
        data = config(custom={"own": {"json": json_file, "images": str(tmp_path / "no")}})
        with pytest.raises(DataError, match=rf"data\.custom\.own\.{key}"):
            prepare(data, "own", tmp_path / "manifest.json")


def test_the_content_hash_follows_pixels_and_text_not_the_encoding(own, tmp_path):
    data = own(GOOD[:1])
    file = tmp_path / "images" / "a.png"

    def content_hash() -> str:
        manifest = prepare(data, "own", tmp_path / "manifest.json")
        return manifest["splits"]["instruct"]["sha256"]

    before, image = content_hash(), Image.open(file).copy()
    encoded = file.read_bytes()
    image.save(file, "PNG", compress_level=0)
    assert file.read_bytes() != encoded and content_hash() == before
    image.putpixel((3, 3), (0, 0, 0))
    image.save(file, "PNG")
    other_pixels = content_hash()
    data = own([{**GOOD[0], "conversations": turns("<image>\nwhat?", "a cat")}])
    assert len({before, other_pixels, content_hash()}) == 3


# --- files that change after preparation ---


def test_a_changed_file_is_another_word_for_the_workflow_until_the_set_is_prepared_anew(
    own, tmp_path
):
    """Dates alone change nothing; what was not there counts too."""
    out, images = tmp_path / "out" / "manifest.json", tmp_path / "images"
    rows = [*GOOD, {"image": "later.png", "conversations": turns("<image>", "x")}]
    config = own(rows, max_bad_share=0.5)

    def changes(do) -> bool:
        before = state(out)
        do()
        changed = state(out)
        manifest = prepare(config, "own", out)
        assert state(out) == changed  # no preparation without end
        assert prepare(config, "own", out) == manifest and state(out) == changed
        return before != changed

    prepare(config, "own", out)
    assert not changes(lambda: os.utime(images / "a.png", (1, 1)))
    assert changes(lambda: (images / "a.png").write_bytes(picture(9)))
    assert changes(lambda: (images / "later.png").write_bytes(picture(3)))
    assert changes((images / "later.png").unlink)
    assert changes(lambda: (tmp_path / "own.json").write_text(json.dumps(rows[1:])))
    (out.parent / "origins.jsonl").write_text("cut off")
    assert changes(lambda: None) is False and state(out) == "unreadable"
    (tmp_path / "own.json").unlink()
    assert state(out) != "unreadable"
    with pytest.raises(DataError, match=r"own\.json can't be read"):
        prepare(config, "own", out)


def test_what_a_checksum_pins_or_was_fetched_and_copied_may_be_deleted(tiny_source, tmp_path):
    tiny_source(easy_vqa, EASY_VQA)
    write(tmp_path / "mirror" / "easy_vqa", EASY_VQA)
    out = tmp_path / "out" / "manifest.json"
    prepare(config(mirror=str(tmp_path / "mirror")), "easy_vqa", out)
    shutil.rmtree(tmp_path / "mirror")
    assert state(out) == ""


def test_a_picture_that_is_not_the_prepared_one_is_an_error_that_names_it(own, processor, tmp_path):
    out, file = tmp_path / "out" / "manifest.json", tmp_path / "images" / "a.png"
    prepare(own(GOOD), "own", out)
    files, content = split_files([out], "instruct"), file.read_bytes()
    data = samples_of(files, processor)
    first = np.asarray(data[0]["images"][0])
    os.utime(file, (1, 1))
    assert np.array_equal(np.asarray(data[0]["images"][0]), first)
    for spoil in (lambda: file.write_bytes(picture(9)), file.unlink):
        spoil()
        for read in (
            lambda: data[0],
            lambda: samples_of(files, processor),
            lambda: bright_picture(out),
        ):
            with pytest.raises(DataError, match=r"a\.png, of row photo, .*snakemake"):
                read()
    assert not data[2]["images"]
    file.write_bytes(content)
    assert np.array_equal(np.asarray(data[0]["images"][0]), first) and bright_picture(out)


# --- samples and batches ---


def test_samples_are_the_rows_encoded(prepared_scenes, processor):
    data = samples_of(split_files([prepared_scenes], "instruct"), processor)
    rows = rows_of(prepared_scenes, "instruct")
    assert len(data) == len(rows)
    for index, row in enumerate(rows):
        [expected] = tokenise(processor, [row["conversations"]], [[(pictures.SIZE, pictures.SIZE)]])
        pixels = processor.image_processor(images=row["image"], return_tensors="pt")
        batch = collate(processor, [data[index]])
        assert data.lengths[index] == batch["input_ids"].shape[1]
        for key, value in zip(("input_ids", "labels"), expand(expected), strict=True):
            assert np.array_equal(batch[key][0], value)
        assert torch.equal(batch["pixel_values"], pixels["pixel_values"])


def test_a_batch_is_padded_on_the_right_and_padding_is_masked(own, processor, tmp_path):
    prepare(own(GOOD), "own", tmp_path / "manifest.json")
    data = samples_of(split_files([tmp_path / "manifest.json"], "instruct"), processor)
    assert data.has_image == [True, True, False]
    batch = collate(processor, [data[0], data[2], data[1]])
    length = max(data.lengths)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, length)
    assert batch["pixel_values"].shape == (2, 3, 64, 64)  # the text sample has none
    for row, index in enumerate([0, 2, 1]):
        mask = torch.arange(length) < data.lengths[index]
        assert torch.equal(batch["attention_mask"][row], mask.long())
        assert (batch["labels"][row][~mask] == IGNORE_INDEX).all()
        assert (batch["input_ids"][row][~mask] == processor.tokenizer.pad_token_id).all()
    assert "pixel_values" not in collate(processor, [data[2]])


def test_long_samples_are_cut_and_dropped_if_no_answer_is_left(own, processor, tmp_path, caplog):
    rows = [
        {"id": 0, "image": "sub/b.jpg", "conversations": turns("<image>\n" + "is " * 50, "yes")},
        {"id": 1, "image": "a.png", "conversations": turns("<image>\nis", "yes " * 50)},
    ]
    prepare(own(rows), "own", tmp_path / "manifest.json")
    files = split_files([tmp_path / "manifest.json"], "instruct")
    data = samples_of(files, processor, 40)
    assert data.lengths == [40] and len(data[0]["input_ids"]) == 40
    assert data[0]["images"][0].getpixel((0, 0)) == (1, 10, 20)  # that of the row that is left
    assert "1 of 2 rows dropped: no answer within max_length 40" in caplog.text
    with pytest.raises(ValueError, match="max_length 2 doesn't hold the 18 tokens"):
        samples_of(files, processor, 2)


def test_several_data_sets_are_joined_and_a_missing_split_is_named(
    own, prepared_scenes, processor, tmp_path
):
    prepare(own(GOOD), "own", tmp_path / "manifest.json")
    both = [prepared_scenes, tmp_path / "manifest.json"]
    assert len(samples_of(split_files(both, "instruct"), processor)) == 10 + 3
    with pytest.raises(ValueError, match=r"own has no split 'align'; it has: instruct"):
        split_files(both, "align")


LENGTHS = np.random.default_rng(0).integers(5, 200, 331).tolist()
HAS_IMAGE = [index % 4 != 0 for index in range(331)]
ORDER = partial(batch_indices, LENGTHS, HAS_IMAGE, 16)


@pytest.mark.parametrize("group", [True, False])
def test_an_epoch_holds_every_sample_once_in_full_batches_but_one(group):
    for epoch in range(3):
        batches = ORDER(seed=1, epoch=epoch, group_by_length=group)
        assert sorted(chain(*batches)) == list(range(331))
        sizes = sorted(map(len, batches))
        assert sizes == [331 % 16] + [16] * (331 // 16)


def test_the_order_depends_on_seed_and_epoch_only():
    assert ORDER(seed=1, epoch=2) == ORDER(seed=1, epoch=2)
    assert ORDER(seed=1, epoch=2) != ORDER(seed=1, epoch=3)
    assert ORDER(seed=1, epoch=2) != ORDER(seed=2, epoch=2)


def test_any_step_can_be_asked_for_first():
    """So a resumed training continues with the batch that would have come next."""
    order = batch_order(LENGTHS, HAS_IMAGE, 16, seed=5)
    steps = [order(step) for step in range(70)]  # more than three epochs
    for step in (69, 21, 0, 40):
        assert batch_order(LENGTHS, HAS_IMAGE, 16, seed=5)(step) == steps[step]
    assert sorted(chain(*steps[21:42])) == list(range(331))


def test_grouped_batches_are_of_one_kind_and_of_similar_length():
    def padding(batches: list[list[int]]) -> float:
        longest = sum(max(LENGTHS[i] for i in batch) * len(batch) for batch in batches)
        return 1 - sum(LENGTHS) / longest

    grouped, plain = ORDER(seed=0, epoch=0), ORDER(seed=0, epoch=0, group_by_length=False)
    mixed = [batch for batch in grouped if len({HAS_IMAGE[i] for i in batch}) == 2]
    assert len(mixed) <= 2  # what was left over of each kind
    assert padding(grouped) < 0.25 * padding(plain)


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="no samples"):
        batch_order([], [], 16, seed=0)
