"""LLaVA's own sets and any of the hub: fetched, laid out, checked and read in the real sets' form,
from a local server that speaks the hub's protocol."""

import io
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from asking import picture, write_parquet
from cases import turns
from hub_server import COMMIT, Hub, hub, image, sha256, zipped
from own_sets import config, rows_of, write
from PIL import Image
from processors import tiny_processor

from sts.pipeline.config import ConfigError
from sts.pipeline.data import collator, llava
from sts.pipeline.data.llava import objects
from sts.pipeline.data.prepare import prepare
from sts.pipeline.data.rows import turns as llava_turns
from sts.pipeline.data.sets import llava_mix665k as mix
from sts.pipeline.data.source import DataError
from sts.pipeline.data.templates import CHAT_TEMPLATE
from sts.pipeline.files import read_json, write_json_atomic
from sts.pipeline.train.feed import load_data, tokens_key
from sts.pipeline.train.job import Job

ROOT = Path(__file__).resolve().parents[2]
MIX = "liuhaotian/LLaVA-Instruct-150K/llava_v1_5_mix665k.json"
OCR = "weizhiwang/llava_v15_instruction_images/ocr_vqa_images_llava_v15.zip"
# the program of a preparation whose original sources are the local server
PREPARE = """
import dataclasses, json, os, sys
from huggingface_hub import constants
from sts.pipeline.config import load_scale
from sts.pipeline.data import fetch
from sts.pipeline.data.prepare import prepare
from sts.pipeline.data.sets import llava_mix665k as mix

constants.DOWNLOAD_CHUNK_SIZE = 100  # of files as small as here
here = os.environ["HF_ENDPOINT"]
local = [
    dataclasses.replace(file, url=f"{here}/{file.url.partition('://')[2]}", sha256="")
    if "://" in file.url else file for file in mix.DATASET.files
]
mix.DATASET = dataclasses.replace(mix.DATASET, files=tuple(local))
prepare(load_scale("scale.yaml"), sys.argv[1], "out/manifest.json")
"""


IMAGES = {
    "coco/train2017/000000033471.jpg": image(0),
    "gqa/images/2354786.jpg": image(1),
    "textvqa/train_images/011e7e629fb9ae7b.jpg": image(2),
    "vg/VG_100K/1.jpg": image(3),
    "vg/VG_100K_2/2.jpg": image(4),
    "ocr_vqa/images/0881505358.jpg": image(5, "GIF"),
    "ocr_vqa/images/1437717772.jpg": image(6)[:300],
}
ASKED = ("<image>\nwhat is it?", "a bus")
ROWS = [
    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
     "conversations": turns(*ASKED, "of which colour?", "white and red")},
    {"id": "wgByO4Y_0", "model": "", "conversations": turns("hello", "hello")},
    {"id": "2", "image": "gqa/images/2354786.jpg", "conversations": turns(*ASKED)},
    {"id": "3", "image": "textvqa/train_images/011e7e629fb9ae7b.jpg",
     "conversations": turns("<image>\nread it", "USER: no. ASSISTANT: yes")},
    {"id": "4", "image": "vg/VG_100K/1.jpg", "conversations": turns(*ASKED)},
    {"id": "5", "image": "vg/VG_100K_2/2.jpg", "conversations": turns(*ASKED)},
    {"id": "0881505358", "image": "ocr_vqa/images/0881505358.jpg", "conversations": turns(*ASKED)},
    {"id": "1437717772", "image": "ocr_vqa/images/1437717772.jpg", "conversations": turns(*ASKED)},
    {"id": "000", "image": "ocr_vqa/images/000.jpg", "conversations": turns(*ASKED)},
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_mirror(monkeypatch):
    monkeypatch.delenv("STS_DATA_MIRROR", raising=False)


def inner(prefix: str) -> dict[str, bytes]:
    return {
        name.removeprefix(prefix): content for name, content in IMAGES.items() if prefix in name
    }


@pytest.fixture
def source(tmp_path):
    """The sources of the 665K set as they are laid out, small."""
    files = {
        f"hub/{MIX}": json.dumps(ROWS).encode(),
        f"hub/{OCR}": zipped(inner("ocr_vqa/images/")),
        "s3.amazonaws.com/images.cocodataset.org/zips/train2017.zip": zipped(inner("coco/")),
        "downloads.cs.stanford.edu/nlp/data/gqa/images.zip": zipped(inner("gqa/")),
        "dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip": zipped(inner("textvqa/")),
        "cs.stanford.edu/people/rak248/VG_100K_2/images.zip": zipped(
            {"VG_100K/1.jpg": IMAGES["vg/VG_100K/1.jpg"]}
        ),
        "cs.stanford.edu/people/rak248/VG_100K_2/images2.zip": zipped(
            {"VG_100K_2/2.jpg": IMAGES["vg/VG_100K_2/2.jpg"]}
        ),
    }
    with hub(write(tmp_path / "served", files)) as served:
        yield served


def run(source: Hub, folder: Path, name: str, **data) -> subprocess.CompletedProcess:
    """A preparation in `folder`, which is offline but for the local server."""
    (folder / "scale.yaml").write_text(json.dumps({"scale": "own", "data": data}))
    environment = {name: value for name, value in os.environ.items() if name != "STS_DATA_MIRROR"}
    environment |= {"HF_ENDPOINT": source.url, "HF_HOME": str(folder / "home")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", PREPARE, name],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_665k_set_is_fetched_checked_and_reported(source, tmp_path):
    """A file that is not what the hub says is fetched again; a source that is gone is named; a
    download that breaks goes on where it was; what is whole is not fetched again; what is known to
    be bad in the real set is said, and only what can't be used is left out."""
    prepared = partial(run, source, tmp_path, "llava_mix665k", max_bad_share=0.3, threads=3)
    wrong = f"/datasets/{MIX.replace('/llava_v1', f'/resolve/{mix.COMMIT}/llava_v1')}"
    source.wrong.add(wrong)
    done = prepared()
    assert done.returncode and "SHA-256" in done.stderr and "as the hub says" in done.stderr
    assert "data.folders.llava_mix665k" in done.stderr
    source.wrong.clear()

    source.cut["/s3.amazonaws.com/images.cocodataset.org/zips/train2017.zip"] = 400
    gqa = source.folder / "downloads.cs.stanford.edu/nlp/data/gqa/images.zip"
    content = gqa.read_bytes()
    gqa.unlink()
    done = prepared()
    assert done.returncode and "gqa/images.zip can't be had" in done.stderr
    gqa.write_bytes(content)

    done = prepared()
    assert done.returncode == 0, done.stderr
    assert source.fetched("train2017.zip") == [0, 400]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["splits"]["instruct"]["rows"] == 7
    assert manifest["bad_rows"] == {"corrupt image": 1, "missing image": 1}
    assert manifest["notes"] == {"GIF named .jpg": 1, "ASSISTANT: in an answer": 1}
    listed = (tmp_path / "out/bad_rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in listed] == ["1437717772", "000"]
    rows = rows_of(tmp_path / "out/manifest.json", "instruct")
    assert rows["id"] == [row["id"] for row in ROWS[:7]]
    assert rows[1]["image"] is None
    raw = tmp_path / "data/raw/llava_mix665k"
    path = rows.with_format("arrow")[0]["image"][0].as_py()["path"]
    assert Path(path).parts[:2] == ("data", "raw")
    assert not list(raw.rglob("*.zip")) and not list(raw.rglob("*.part"))
    note = json.loads((raw / ".whole/ocr_vqa-images.json").read_text())
    archive = (source.folder / "hub" / OCR).read_bytes()
    assert note["sha256"] == sha256(archive) and note["commit"] == COMMIT
    source.requests.clear()
    assert prepared().returncode == 0 and source.requests == []
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == manifest


def test_a_folder_of_the_users_is_used_as_it_lies(tmp_path):
    folder = write(
        tmp_path / "own", IMAGES | {"llava_v1_5_mix665k.json": json.dumps(ROWS).encode()}
    )
    configuration = config(folders={"llava_mix665k": str(folder)}, max_bad_share=0.3)
    manifest = prepare(configuration, "llava_mix665k", tmp_path / "manifest.json")
    assert manifest["splits"]["instruct"]["rows"] == 7
    names = {"llava_v1_5_mix665k.json", "coco", "gqa", "textvqa", "vg", "ocr_vqa"}
    assert {file.name for file in folder.iterdir()} == names
    (folder / "vg/VG_100K_2/2.jpg").unlink()
    (folder / "vg/VG_100K_2").rmdir()
    with pytest.raises(DataError, match=r"own lacks vg/VG_100K_2.*data.folders.llava_mix665k"):
        prepare(configuration, "llava_mix665k", tmp_path / "manifest.json")


def test_llava_pretrain_lies_in_a_mirror(tmp_path):
    rows = [{"id": "004539375", "image": "00453/004539375.jpg", "conversations": turns(*ASKED)}]
    files = {"blip_laion_cc_sbu_558k.json": json.dumps(rows).encode()}
    write(tmp_path / "mirror/llava_pretrain", files | {"images/00453/004539375.jpg": image(0)})
    configuration = config(mirror=str(tmp_path / "mirror"))
    manifest = prepare(configuration, "llava_pretrain", tmp_path / "manifest.json")
    assert manifest["splits"]["align"]["rows"] == 1


# ---- any set of the hub -----------------------------------------------------------------------

CAULDRON = {
    "images": datasets.List(datasets.Image()),
    "texts": datasets.List(
        dict.fromkeys(["user", "assistant", "source"], datasets.Value("string"))
    ),
}
ONEVISION = {
    "id": datasets.Value("string"),
    "image": datasets.Image(),
    "conversations": datasets.List(dict.fromkeys(["from", "value"], datasets.Value("string"))),
    "data_source": datasets.Value("string"),
}


def cauldron(folder: Path) -> None:
    pair = {"user": "what?", "assistant": "a bus", "source": "vqav2"}
    rows = [
        {"images": [picture(0), picture(1)], "texts": [pair, pair]},
        {"images": [picture(2)], "texts": [pair]},
    ]
    write_parquet(rows, CAULDRON, folder / "vqav2/train-00000-of-00001.parquet")


def test_the_cauldrons_form_from_the_hub_and_from_a_folder(tmp_path):
    cauldron(tmp_path / "served/hub/HuggingFaceM4/the_cauldron")
    write(tmp_path / "served/hub/HuggingFaceM4/the_cauldron", {"other/a.parquet": b"not asked for"})
    files = {"files": "vqav2/*.parquet"}
    with hub(tmp_path / "served") as served:
        entry = {"hub": "HuggingFaceM4/the_cauldron", **files}
        done = run(served, tmp_path, "vqa", custom={"vqa": entry})
        assert done.returncode == 0, done.stderr
        assert served.fetched("a.parquet") == []
    rows = rows_of(tmp_path / "out/manifest.json", "instruct")
    first = rows[0]
    assert [np.asarray(image).tolist() for image in first["images"]] == [
        np.asarray(picture(seed)).tolist() for seed in (0, 1)
    ]
    assert [turn["value"] for turn in first["conversations"]] == [
        "<image>\n<image>\nwhat?", "a bus", "what?", "a bus",
    ]  # fmt: skip
    folder = tmp_path / "served/hub/HuggingFaceM4/the_cauldron"
    local = config(custom={"vqa": {"hub": str(folder), **files}})
    prepare(local, "vqa", tmp_path / "local/manifest.json")
    assert rows_of(tmp_path / "local/manifest.json", "instruct").to_list() == rows.to_list()


def test_onevisions_form_keeps_text_only_rows_and_where_images_stand(tmp_path):
    rows = [
        {"id": "a", "image": picture(0), "conversations": turns("see <image> here", "a bus"),
         "data_source": "x"},
        {"id": "b", "image": None, "conversations": turns("hello", "hello"), "data_source": "x"},
    ]  # fmt: skip
    write_parquet(rows, ONEVISION, tmp_path / "set/sub/train-0.parquet")
    configuration = config(custom={"own": {"hub": str(tmp_path / "set"), "split": "instruct"}})
    assert prepare(configuration, "own", tmp_path / "manifest.json")["bad_rows"] == {}
    first, second = rows_of(tmp_path / "manifest.json", "instruct")
    assert first["conversations"] == turns("see <image> here", "a bus") and first["image"]
    assert second["conversations"] == turns("hello", "hello") and second["image"] is None


def test_turns_of_the_hub_that_are_none_are_left_to_the_check():
    assert llava_turns({"conversations": None}, 1) is None
    assert llava_turns({"texts": []}, 1) == []
    for value in (None, 5):
        [first, _] = llava_turns({"texts": [{"user": value, "assistant": "x"}]}, 1)
        assert first == {"from": "human", "value": value}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"has no files \*\*/\*.parquet. Correct data.custom.own.files"),
        (
            {"a.parquet": b"no"},
            r"set/a\.parquet can't be read.*Put a good copy there",
        ),
    ],
)
def test_a_folder_without_the_files_is_named(tmp_path, files, message):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", files)
    configuration = config(custom={"own": {"hub": str(tmp_path / "set")}})
    with pytest.raises(DataError, match=message):
        prepare(configuration, "own", tmp_path / "manifest.json")


@pytest.mark.parametrize("form", ["bytes", "path", "bytes alone", "path alone"])
def test_images_of_a_parquet_file_may_be_stored_in_any_form(tmp_path, form):
    content = image(0, "PNG")
    write(tmp_path / "set", {"images/0.png": content})
    path = "images/0.png"
    cell = {
        "bytes": {"bytes": content, "path": None},
        "path": {"bytes": None, "path": path},
        "bytes alone": content,
        "path alone": path,
    }[form]
    rows = [{"id": None, "image": cell, "conversations": turns("see", "a bus")}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set/a.parquet")
    configuration = config(custom={"own": {"hub": str(tmp_path / "set"), "split": "instruct"}})
    assert prepare(configuration, "own", tmp_path / "manifest.json")["bad_rows"] == {}
    [row] = rows_of(tmp_path / "manifest.json", "instruct")
    assert row["id"] == "00000000"
    expected = np.asarray(Image.open(io.BytesIO(content)))
    assert np.array_equal(np.asarray(row["image"]), expected)


def test_a_second_file_with_other_columns_is_named(tmp_path):
    write_parquet(
        [{"id": "1", "image": None, "conversations": turns("hi", "x"), "data_source": ""}],
        ONEVISION, tmp_path / "set/a.parquet",
    )  # fmt: skip
    pq.write_table(pa.table({"image": [None], "caption": ["x"]}), tmp_path / "set/b.parquet")
    configuration = config(custom={"own": {"hub": str(tmp_path / "set"), "split": "instruct"}})
    message = "b.parquet has the columns image, caption, but needs image and conversations"
    with pytest.raises(DataError, match=message):
        prepare(configuration, "own", tmp_path / "manifest.json")


def test_other_columns_are_named(tmp_path):
    columns = {"picture": datasets.Image(), "caption": datasets.Value("string")}
    write_parquet([{"picture": picture(0), "caption": "x"}], columns, tmp_path / "set/a.parquet")
    configuration = config(custom={"own": {"hub": str(tmp_path / "set")}})
    with pytest.raises(DataError, match="has the columns picture, caption, but needs images"):
        prepare(configuration, "own", tmp_path / "manifest.json")


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({}, "json"),
        ({"json": "a.json", "images": "b", "hub": "c/d"}, "json"),
        ({"json": "a.json"}, "images"),
    ],
)
def test_an_entry_is_one_of_the_two_kinds(entry, key):
    with pytest.raises(ConfigError, match=f"data.custom.own.{key}"):
        config(custom={"own": entry})


# ---- reading and taking a part ----------------------------------------------------------------


@pytest.mark.parametrize("read", [1, 7, 64, 2**20])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_read_item_by_item_whatever_is_read_at_a_time(
    tmp_path, monkeypatch, read, indent
):
    monkeypatch.setattr(llava, "READ", read)
    items = [*ROWS, {"a": 'quoted \\" ] , { é \u2028'}, [], {}, "text"]
    for content in (items, []):
        for ascii_only in (True, False):
            text = json.dumps(content, indent=indent, ensure_ascii=ascii_only)
            for encoding in ("utf-8", "utf-8-sig"):
                (tmp_path / "a.json").write_text(f"{text}\n \n", encoding=encoding)
                assert list(objects(tmp_path / "a.json")) == content


@pytest.mark.parametrize("read", [3, 2**20])
@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", '[{"a": 1}', '[{"a": 1} {"b": 2}]', '[{"a": ', "[1, ", "[1] [2]", "[1]\n[2]"),
        *("[] []", "[1]" + 9 * "\n" + "<<<<<<< HEAD", "[1],"),
    ],
)
def test_what_is_no_whole_list_is_refused(tmp_path, monkeypatch, text, read):
    monkeypatch.setattr(llava, "READ", read)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"^(?!.*out of range)"):
        list(objects(tmp_path / "a.json"))


def test_a_part_of_a_set_is_the_same_rows_each_time_in_their_order(tmp_path):
    rows = [{"id": str(n), "conversations": turns("what?", str(n))} for n in range(50)]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    own = {"json": str(tmp_path / "own.json"), "images": str(tmp_path)}

    def taken(count: int) -> list[int]:
        configuration = config(custom={"own": own}, rows={"own": count})
        prepare(configuration, "own", tmp_path / "out/manifest.json")
        return [int(id) for id in rows_of(tmp_path / "out/manifest.json", "instruct")["id"]]

    some = taken(10)
    assert len(some) == 10 and some == sorted(some) != list(range(10))
    assert taken(10) == some
    assert set(some) < set(taken(20))
    assert taken(99) == list(range(50))


def test_threads_change_nothing_that_is_written(tmp_path):
    rows = [
        {"id": str(n), "image": f"{n % 7}.jpg", "conversations": turns(*ASKED)} for n in range(200)
    ]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    write(tmp_path, {f"{n}.jpg": image(n) for n in range(6)})
    own = {"json": str(tmp_path / "own.json"), "images": str(tmp_path)}
    made = []
    for threads in (1, 4):
        configuration = config(custom={"own": own}, threads=threads, max_bad_share=1.0)
        out = tmp_path / str(threads) / "manifest.json"
        made.append(prepare(configuration, "own", out))
        made[-1] = (made[-1], (out.parent / "bad_rows.jsonl").read_text())
    assert made[0] == made[1]
    assert made[0][0]["bad_rows"] == {"missing image": 28}


# ---- tokens, made once ------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path) -> Path:
    rows = [{"id": str(n), "conversations": turns("what?", f"a {n % 5}")} for n in range(40)]
    rows.append({"id": "p", "image": "0.jpg", "conversations": turns(*ASKED)})
    (tmp_path / "own.json").write_text(json.dumps(rows))
    write(tmp_path, {"0.jpg": image(0)})
    own = {"json": str(tmp_path / "own.json"), "images": str(tmp_path)}
    prepare(config(custom={"own": own}), "own", tmp_path / "data/manifest.json")
    return tmp_path / "data/manifest.json"


def block(**changes):
    return config().stage("instruct").model_copy(update={"data": ["own"], **changes})


def test_tokens_are_made_once_for_all_that_ask_for_the_same(prepared, tmp_path, monkeypatch):
    def job(seed=0, results=tmp_path, **changes) -> Job:
        only = config().model_copy(update={"stages": {"instruct": block(**changes)}})
        out = results / "runs" / "dense" / "seed0" / "instruct.json"
        return Job(only, "dense", seed, "instruct", [prepared], prepared, out)

    processor = tiny_processor()
    processor.chat_template = CHAT_TEMPLATE
    plain, order = load_data(job(results=tmp_path / "other"), processor)
    kept, same = load_data(job(), processor)
    monkeypatch.setattr(collator, "tokenise", None)  # nobody calls it any more
    again, _ = load_data(job(seed=1, batch_size=3), processor)
    assert plain.lengths == kept.lengths == again.lengths
    assert [order(n) for n in range(9)] == [same(n) for n in range(9)]
    for n in range(41):
        for name in ("input_ids", "labels"):
            assert np.array_equal(plain[n][name], kept[n][name])
            assert np.array_equal(plain[n][name], again[n][name])
    assert len(list((tmp_path / "tokens").glob("*.arrow"))) == 1

    def key(job: Job) -> str:
        return tokens_key(job, processor, job.data, "instruct")

    # of another length, template or content they are others
    keys = {key(job())}
    keys.add(key(job(max_length=99)))
    processor.chat_template = CHAT_TEMPLATE.replace("user", "human")
    keys.add(key(job()))
    write_json_atomic(prepared, read_json(prepared) | {"sha256": "0" * 64})
    keys.add(key(job()))
    assert len(keys) == 4


@pytest.mark.slow
def test_processes_that_ask_at_once_wait_for_the_first(prepared, tmp_path):
    """As the processes of a training do; what was half written when one was killed is no file."""
    program = """
import sys
from pathlib import Path
from processors import tiny_processor
from sts.pipeline.config import MINI, load_scale
from sts.pipeline.data import collator
from sts.pipeline.data.templates import CHAT_TEMPLATE
from sts.pipeline.train.feed import load_data
from sts.pipeline.train.job import Job

calls, tokenise = [], collator.tokenise
collator.tokenise = lambda *inputs: calls.append(1) or tokenise(*inputs)
processor = tiny_processor()
processor.chat_template = CHAT_TEMPLATE
data, out = map(Path, sys.argv[1:])
job = Job(load_scale(MINI), "dense", 0, "instruct", [data], data, out)
samples, _ = load_data(job, processor)
print(len(calls), len(samples))
"""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, prepared, tmp_path / "runs/dense/seed0/instruct.json"],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert sorted(process.communicate()[0] for process in both) == ["0 41\n", "1 41\n"]


@pytest.mark.slow
def test_a_process_needs_no_more_memory_for_more_rows(tmp_path):
    """So little more that 665,298 rows, as the real set has, stay below 2 GB."""
    few, many = (1500, 9000)
    taken = {}
    for rows in (few, many):
        done = subprocess.run(
            [sys.executable, ROOT / "tests/many_rows.py", str(rows), tmp_path / str(rows)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
            capture_output=True,
            text=True,
            check=True,
        )
        taken[rows] = json.loads(done.stdout.splitlines()[-1])
    for step, last in taken[many].items():
        grown = last["mb"] - taken[few][step]["mb"] - 15  # which equal runs differ by
        a_row = max(0, grown) / (many - few)
        assert last["mb"] + (665_298 - many) * a_row < 2000, (step, taken)
