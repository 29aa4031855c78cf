"""What `python -m sts verify` finds in a small made-up scale, each file spoilt in each way."""

import shutil
from pathlib import Path

import pytest
from configs import short

from sts.__main__ import main
from sts.pipeline.config import dump
from sts.pipeline.files import hashes, read_json, write_json_atomic
from sts.pipeline.train.checkpoint import weights_sha256
from sts.pipeline.verify import TABLE, verify

RESULTS, DATA = Path("results/tiny"), Path("data/tiny/scenes")
RUN = RESULTS / "runs/dense/seed0"


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.fixture
def scale(tmp_path, monkeypatch) -> Path:
    """A finished scale of one run with its table and a figure, in the folder where we now are."""
    monkeypatch.chdir(tmp_path)
    config = short().model_copy(update={"seeds": [0]})
    write(RESULTS / "configs/dense.yaml", dump(config))
    write(Path("ablations.yaml"), "dense: {groups: [main], label: D, source: baseline}\n")
    write(DATA / "align.arrow", "rows")
    splits = {"align": {"file": "align.arrow", "rows": 1}}
    files = hashes(DATA, [DATA / "align.arrow"])
    write_json_atomic(DATA / "manifest.json", {"splits": splits, "files": files})
    tower = write(Path("backbone/model.safetensors"), "tower")
    write_json_atomic(RESULTS / "backbone/dense.json", {"files": hashes(".", [tower])})
    for stage in config.stages:
        folder = RESULTS / "weights" / stage
        names = ("model.safetensors", "config.json", "history.jsonl")
        files = hashes(folder, [write(folder / name, f"{stage} {name}") for name in names])
        hash_of_all = {"weights_sha256": weights_sha256(files)}
        write_json_atomic(folder / "done.json", hash_of_all | {"files": files})
        about = {"ablation": "dense", "seed": 0, "stage": stage, "weights": str(folder)}
        write_json_atomic(RUN / f"{stage}.json", about | hash_of_all)
    write_json_atomic(RUN / "eval.json", {"benchmarks": {}})
    write_json_atomic(RESULTS / "bench/main.json", {"variants": {}})
    for ending in TABLE:
        write(RESULTS / f"tables/main{ending}", "{}")
    for ending in (".svg", ".png"):
        write(RESULTS / f"figures/loss{ending}", "a picture")
    return tmp_path


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


SPOIL = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "flipped": flip,
    "gone": Path.unlink,
}
# Nothing is made from tables and figures: that they are there is enough. Without its configuration
# nobody can tell what a table was made from; every call writes it.
OF_WHAT_IS_READ = [
    "backbone/model.safetensors", f"{DATA}/align.arrow", f"{DATA}/manifest.json",
    *(f"{RESULTS}/{name}" for name in ("backbone/dense.json", "bench/main.json")),
    *(f"{RUN}/{name}.json" for name in ("align", "instruct", "eval")),
    *(f"{RESULTS}/weights/align/{name}" for name in (
        "model.safetensors", "config.json", "history.jsonl", "done.json",
    )),
]  # fmt: skip
OF_WHAT_IS_SHOWN = [f"{RESULTS}/tables/main{ending}" for ending in TABLE]
OF_WHAT_IS_SHOWN += [f"{RESULTS}/figures/loss{ending}" for ending in (".svg", ".png")]


def test_every_spoilt_file_is_named_with_its_cure_and_nothing_else(scale):
    assert verify(RESULTS, Path("ablations.yaml")) == []
    cases = [(name, way) for name in OF_WHAT_IS_READ for way in SPOIL]
    cases += [(name, way) for name in OF_WHAT_IS_SHOWN for way in ("empty", "gone")]
    for name, way in cases:
        kept = shutil.copy2(name, "kept")
        SPOIL[way](Path(name))
        lines = verify(RESULTS, Path("ablations.yaml"))
        assert lines, f"{name} {way}: not found"
        for line in lines:
            assert name in line, (name, way)
            assert any(word in line for word in ("elete", "snakemake", "Get it back")), line
        shutil.copy2(kept, name)
    assert verify(RESULTS, Path("ablations.yaml")) == []


def test_the_verb_says_whether_all_is_as_it_was_written(scale, capsys):
    words = ["verify", "--results", str(RESULTS), "--ablations", "ablations.yaml"]
    assert main(words) == 0
    assert capsys.readouterr().out == "All files are as they were written.\n"
    (RUN / "eval.json").unlink()
    assert main(words) == 1
    assert capsys.readouterr().out == (
        f"{RUN}/eval.json: missing or empty. snakemake {RUN}/eval.json makes it again\n"
    )


def test_the_repositorys_backbones_are_those_that_it_lists():
    """After a change: write_json_atomic(root / "sha256.json", hashes(root, files))."""
    root = Path(__file__).parents[2] / "data/backbones"
    files = [file for file in root.rglob("*") if file.is_file() and "quality" not in file.name]
    files.remove(root / "sha256.json")
    assert hashes(root, files) == read_json(root / "sha256.json")
