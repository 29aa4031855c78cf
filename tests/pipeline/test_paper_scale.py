"""The paper's scale on tiny parts of its classes: fetched by the target `data`; then, without a
network, trained in shards, killed, gone on with, and asked all its benchmarks."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lm_eval.tasks
import pytest
import yaml
from cases import turns
from hub_server import COMMIT, hub, image, zipped
from hub_sets import OFFICIAL, write_mmmu, write_sets
from parts import joined
from project import call, edit, environment, real_project, wait_for

PAPER = "workflow/config/paper.yaml"
TARGETS = ("all", "expected", "ablations", "bench")
COMMAND = ("--configfile", PAPER, "small.yaml", "--", *TARGETS)
URLS = ("https://s3.amazonaws.com", "https://downloads.cs.stanford.edu",
        "https://dl.fbaipublicfiles.com", "https://cs.stanford.edu")  # fmt: skip
FOLDERS = {
    "coco/train2017": "s3.amazonaws.com/images.cocodataset.org/zips/train2017.zip",
    "gqa/images": "downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
    "textvqa/train_images": "dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
    "vg/VG_100K": "cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
    "vg/VG_100K_2": "cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
}
LONG = '"max_position_embeddings": 4096'  # as Vicuna's: some questions are long
HUB = Path("hub/liuhaotian")
OCR = "hub/weizhiwang/llava_v15_instruction_images/ocr_vqa_images_llava_v15.zip"
ROWS = """
dense: {groups: [main, components], label: Dense, source: baseline}
sts:
  groups: [main, components]
  label: STS
  source: paper
  overrides:
    align: {vtc: {kind: random, keep: 0.5}}
    instruct: {lds: {policy: sts, rate: 0.5, epsilon: 1.0}}
"""
# what differs from the paper's scale: sizes, and as many processes as this machine has cores
SMALL = {
    "stages": {
        name: {"steps": 8, "batch_size": 2, "processes": 2, "checkpoint_every": 1, "threads": 1}
        for name in ("align", "instruct")
    },
    "evaluate": {"limit": 2, "batch_tokens": 4096, "processes": 2},
    "bench": {"points": 1, "warmup": 0},
}


def publish(root: Path) -> None:
    """LLaVA's two sets at their sources, a few rows each."""
    captions = [
        {"id": f"{n}", "image": f"000/{n}.jpg",
         "conversations": turns("<image>\nwhat is it?", f"a red bowl {n}")}
        for n in range(20)
    ]  # fmt: skip
    questions, archives = [], {}
    for folder, archive in FOLDERS.items():
        inner = folder.partition("/")[2]
        archives[archive] = {f"{inner}/{n}.jpg": image(n) for n in range(4)}
        questions += [
            {"id": f"{folder}{n}", "image": f"{folder}/{n}.jpg",
             "conversations": turns("<image>\nwhat is it?", "a bowl", "sure?", "yes")}
            for n in range(4)
        ]  # fmt: skip
    questions += [
        {"id": f"text{n}", "conversations": turns("what is it?", "a bowl")} for n in range(6)
    ]
    questions += [{"id": "lost", "image": "ocr_vqa/images/lost.jpg",
               "conversations": turns("<image>\nwho?", "nobody")}]  # fmt: skip
    archives[str(HUB / "LLaVA-Pretrain/images.zip")] = {
        f"000/{n}.jpg": image(n, size=(40, 30 + n)) for n in range(20)
    }
    archives[OCR] = {"0.jpg": image(0)}
    files = {name: zipped(content) for name, content in archives.items()}
    files[str(HUB / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json")] = json.dumps(captions).encode()
    files[str(HUB / "LLaVA-Instruct-150K/llava_v1_5_mix665k.json")] = json.dumps(questions).encode()
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


@pytest.mark.slow
def test_from_the_sources_to_the_tables_with_a_kill_between(tmp_path):
    project, results = real_project(tmp_path / "project"), tmp_path / "project/results/paper"
    (project / "workflow/ablations.yaml").write_text(ROWS)
    served_sets = tmp_path / "served/hub"
    joined(served_sets / "own")
    edit(served_sets / "own/language/config.json", '"max_position_embeddings": 512', LONG)
    publish(tmp_path / "served")
    renamed = {name.replace("lmms-lab/", "lmms-lab-encoder/"): OFFICIAL[name] for name in OFFICIAL}
    write_sets(served_sets, renamed)
    files = Path(lm_eval.tasks.__file__).parent.glob("mmmu/mmmu_*.yaml")
    write_mmmu(served_sets, [yaml.safe_load(file.read_text())["dataset_name"] for file in files])
    model = {"vision": "own/vision", "language": f"own/language@{COMMIT}", "layers": 2}
    small = SMALL | {"model": model, "data": {"max_bad_share": 0.1, "threads": 2}}
    (project / "small.yaml").write_text(yaml.safe_dump(small))
    variables = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}

    with hub(tmp_path / "served") as served:
        for url in URLS:
            address = f"{served.url}/{url.partition('://')[2]}"
            edit(project / "sts/pipeline/data/sets/llava_mix665k.py", url, address)
        edit(project / "sts/pipeline/data/sets/llava_mix665k.py", ", sha256=COCO_SHA256", "")
        served.cut[f"/{FOLDERS['coco/train2017']}"] = 500
        env = environment(HF_ENDPOINT=served.url, **variables)
        fetch = [*COMMAND[: -len(TARGETS)], "data"]
        done = subprocess.run(call(*fetch), cwd=project, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    env = environment(HF_ENDPOINT=served.url, HF_HUB_OFFLINE="1", **variables)
    log = (tmp_path / "log.txt").open("w+")

    @contextmanager
    def running() -> Iterator[subprocess.Popen]:
        """The call, of which nothing is left afterwards."""
        process = subprocess.Popen(
            call(*COMMAND), cwd=project, env=env, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    with running() as first:
        wait_for(lambda: first.poll() is None and list(results.glob("weights/*/state/*")), 600)
    with running() as second:
        assert second.wait(timeout=900) == 0, Path(log.name).read_text()[-4000:]
    again = subprocess.run(call(*COMMAND), cwd=project, env=env, capture_output=True, text=True)
    assert "Nothing to be done" in again.stdout + again.stderr

    mix = json.loads((project / "data/paper/llava_mix665k/manifest.json").read_text())
    assert mix["splits"]["instruct"]["rows"] == 26 and mix["bad_rows"] == {"missing image": 1}
    assert len(served.fetched("train2017.zip")) == 2, "once more after it broke"
    for id in ("dense", "sts"):
        manifest = json.loads((results / f"runs/{id}/seed0/instruct.json").read_text())
        evaluation = json.loads((results / f"runs/{id}/seed0/eval.json").read_text())
        assert (project / manifest["weights"] / "model.safetensors").exists(), (
            "an ordinary checkpoint"
        )
        benchmarks = yaml.safe_load((project / PAPER).read_text())["evaluate"]["benchmarks"]
        assert set(evaluation["benchmarks"]) == set(benchmarks) and all(
            score["n"] for score in evaluation["benchmarks"].values()
        )
    table = (results / "tables/main.md").read_text()
    assert ("STS" in table and "POPE" in table) or "pope" in table
    assert (results / "tables/components.md").exists()
    expected = (results / "tables/expected.csv").read_text()
    assert expected.count("\n") == 10 and "FAIL" in expected, "nine published scores"
