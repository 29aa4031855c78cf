"""The campaign of faults (tests/campaign.py): a slice of it runs, and it sees what is lost."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import campaign
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_slice_of_the_campaign_survives(tmp_path):
    """One training: two kills in a row, four spoilt checkpoints; a whole call killed, then two at
    once; the training twice at once."""
    command = [sys.executable, ROOT / "tests/campaign.py", "--out", tmp_path / "slice"]
    faults = {"verbs": 2, "checkpoint": 4, "together": 2}
    target = campaign.TRAINED.format("dense", "align")
    done = subprocess.run(
        [*command, "--only", *faults, "--kills", "5", "--targets", target],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    trials = json.loads((tmp_path / "slice.json").read_text())["trials"]
    assert Counter(trial["fault"] for trial in trials) == faults
    assert all(trial["survived"] for trial in trials)
    lost = [trial["again"] for trial in trials if trial["fault"] == "checkpoint"]
    assert min(lost) >= campaign.EVERY, "none were lost to it"
    assert "| 4 | 4 |" in (tmp_path / "slice.md").read_text()


@pytest.fixture
def project(tmp_path) -> Path:
    """A finished training, as far as the campaign compares it."""
    folder = tmp_path / "results/smoke/weights/key"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "history.jsonl").write_text('{"step": 0, "loss": 1.0, "seconds": 2.0}\n')
    run = tmp_path / "results/smoke/runs/dense/seed0/align.json"
    run.parent.mkdir(parents=True)
    sha256 = campaign.sha256_file(folder / "model.safetensors")
    run.write_text(json.dumps({"weights": "results/smoke/weights/key", "weights_sha256": sha256}))
    (tmp_path / "results/smoke/tables").mkdir()
    (tmp_path / "results/smoke/tables/main.md").write_text("0.81")
    return tmp_path


WEIGHTS, HISTORY = "weights/key/model.safetensors", "weights/key/history.jsonl"


@pytest.mark.parametrize(
    ("name", "text", "lost"),
    [
        (WEIGHTS, "weightz", "other bytes"),
        (WEIGHTS, None, "missing"),
        (HISTORY, '{"step": 0, "loss": 1.1, "seconds": 2.0}\n', "other bytes"),
        ("weights/key/.part", "", "left over"),
        ("tables/main.md", "", "other bytes"),
    ],
)
def test_what_is_lost_is_seen(project, name, text, lost):
    expected, file = campaign.facts(project), project / "results/smoke" / name
    campaign.equal(project, expected)
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(AssertionError, match=f"{name}': '{lost}"):
        campaign.equal(project, expected)


def test_times_may_differ_and_weights_are_those_of_the_manifest(project):
    expected = campaign.facts(project)
    (project / "results/smoke" / HISTORY).write_text('{"step": 0, "loss": 1.0, "seconds": 3.0}\n')
    (project / "results/smoke/tables/main.md").write_text("0.82")
    campaign.equal(project, expected)
    (project / "results/smoke" / WEIGHTS).write_bytes(b"others")
    with pytest.raises(AssertionError, match="are not those of"):
        campaign.equal(project, campaign.facts(project))


def test_a_fault_that_is_not_survived_is_in_the_table_and_the_exit_status(tmp_path):
    place = campaign.Campaign(tmp_path, (), 1, campaign.random.Random(0))
    trials = []
    for again in (3, 0):
        with place.trial("verbs", "train align dense", 1.0) as trial:
            trials.append(trial)
            trial.again = again
    with place.end_of(trials[1:]):
        raise AssertionError("other bytes")
    assert [trial.survived for trial in place.trials] == [True, False]
    about = dict.fromkeys(("command", "commit", "seed", "machine", "minutes"), "x")
    text = campaign.report(place, {"disk": "only root may mount here"}, about)
    assert "| 2 | 1 | 3 | 3 |" in text
    assert "| not tried: only root may mount here |" in text
    assert "- verbs, train align dense: AssertionError: other bytes" in text
