"""A trained run as a model for others: files, card, and what the page says of both."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from asking import picture
from configs import short
from hub_server import hub
from huggingface_hub import ModelCard
from made_results import write
from transformers import AutoModelForImageTextToText

from sts.__main__ import main
from sts.pipeline.config import dump
from sts.pipeline.files import SpoiltError
from sts.pipeline.report.export import export
from sts.pipeline.train.job import Job
from sts.pipeline.train.train import train

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/export.md").read_text()
ENTRY = {"blind": 0.25, "majority": None, "metric": "exact_match", "n": 20, "score": 0.75}


@pytest.fixture(scope="module")
def results(backbone, prepared, tmp_path_factory):
    """Results of a run of two short stages."""
    folder = tmp_path_factory.mktemp("export") / "results"
    config, start = short(), backbone
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STS_TRACKING", "off")
        for stage in config.stages:
            out = folder / "runs/sts/seed0" / f"{stage}.json"
            train(Job(config, "sts", 0, stage, [prepared], start, out))
            start = out
    (folder / "configs").mkdir()
    (folder / "configs/sts.yaml").write_text(dump(config))
    write(folder / "runs/sts/seed0/eval.json", {"benchmarks": {"colour": ENTRY}})
    return folder


def weights(results: Path) -> Path:
    return Path(json.loads((results / "runs/sts/seed0/instruct.json").read_text())["weights"])


def test_the_folder_is_a_model_that_everybody_may_read_and_the_run_stays_as_it_was(
    results, tmp_path
):
    before = {file: file.read_bytes() for file in weights(results).iterdir()}
    words = ["--ablation", "sts", "--seed", "0", "--results", str(results)]
    assert main(["export", *words, "--to", str(tmp_path / "model")]) == 0
    files = {file.name: file for file in (tmp_path / "model").iterdir()}
    assert {"model.safetensors", "chat_template.jinja", "processor_config.json"} <= files.keys()
    assert not {"done.json", "history.jsonl", "provenance.json"} & files.keys()
    assert {file.stat().st_mode & 0o777 for file in files.values()} == {0o644}
    mine, theirs = (
        AutoModelForImageTextToText.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "model", weights(results))
    )
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert {file: file.read_bytes() for file in weights(results).iterdir()} == before


def test_the_card_says_what_the_result_files_hold(results, tmp_path):
    export(results, "sts", 0, tmp_path / "model")
    card = ModelCard.load(tmp_path / "model/README.md")
    (score,) = card.data.eval_results
    assert (score.dataset_name, score.metric_type, score.metric_value) == (
        "colour", "exact_match", 0.75,
    )  # fmt: skip
    assert card.data.base_model is None, "a folder is no model of the hub"
    assert "| colour | exact_match | 0.750 | 0.250 | n/a | 20 |" in card.text
    stages = re.findall(r"^\| (\w+) \| scenes \| 4 \| none \| none \| 0\.\d+ \|", card.text, re.M)
    assert stages == ["align", "instruct"]
    assert "Energy was not measured" in card.text


def test_what_cannot_be_exported_is_refused_and_nothing_written(results, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"seed7/instruct\.json"):
        export(results, "sts", 7, tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(FileExistsError, match="has files already"):
        export(results, "sts", 0, tmp_path / "full")
    file = weights(results) / "config.json"
    text = file.read_text()
    file.write_text(text + " ")
    with pytest.raises(SpoiltError, match=r"config\.json"):
        export(results, "sts", 0, tmp_path / "model")
    file.write_text(text)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert main(["export", "--ablation", "sts", "--seed", "0"]) == 2, "neither --to nor --push"


def test_a_push_is_the_same_files(results, tmp_path):
    export(results, "sts", 0, tmp_path / "model")
    command = [sys.executable, "-m", "sts", "export", "--ablation", "sts", "--seed", "0"]
    with hub(tmp_path / "served") as served:
        done = subprocess.run(
            [*command, "--results", str(results), "--push", "me/mine"], cwd=ROOT,
            capture_output=True, text=True,
            env=os.environ | {"HF_ENDPOINT": served.url, "HF_TOKEN": "hf_none",
                              "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{served.url}/me/mine"
    pushed = {file.name: file.read_bytes() for file in (tmp_path / "served/hub/me/mine").iterdir()}
    assert pushed == {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}


def test_the_code_of_the_page_answers(results, tmp_path, monkeypatch):
    export(results, "sts", 0, tmp_path / "my-model")
    picture(0).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"## transformers.*?```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert isinstance(names["answer"], str)
