"""Scores are the share of right answers; the controls are what they claim to be."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from functools import partial
from hashlib import sha256
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from asking import Oracle, picture, write_arrow
from configs import RECIPE
from hub_sets import ART, write_chartqa, write_mmmu

from sts.__main__ import main
from sts.pipeline.config import ConfigError, dump, validate
from sts.pipeline.data.prepare import prepare
from sts.pipeline.data.source import DataError
from sts.pipeline.evaluate import asking
from sts.pipeline.evaluate import evaluate as module
from sts.pipeline.evaluate.evaluate import evaluate
from sts.pipeline.evaluate.loading import fetch, load_benchmarks
from sts.pipeline.evaluate.scoring import clustered_error, guesses
from sts.pipeline.files import SpoiltError, hashes, read_json, sha256_json, write_json_atomic
from sts.pipeline.tasks import official
from sts.pipeline.tasks import registry as benchmarks
from sts.pipeline.train.model import build

NOT_ASKED = "too long for the model's context: not asked"
PAGE = Path(__file__).resolve().parents[2] / "docs/evaluation.md"
BENCHMARKS = ["existence", "colour"]
GREY = 128


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("STS_TRACKING", "off")
    monkeypatch.delenv("STS_DATA_MIRROR", raising=False)  # it would win over data.mirror


def configured(evaluate: dict, **more):
    """A small configuration with these values of `evaluate`, which asks all again in grey."""
    data = {"scenes": {"seed": 5, "align": 4, "instruct": 4, "test": 20}, **more}
    stages = {"instruct": RECIPE | {"trains": ["projector"], "batch_size": 4}}
    evaluate = {"blind": 1, **evaluate}
    return validate({"data": data, "stages": stages, "evaluate": evaluate}, "test.yaml")


def varied(config, **evaluate):
    """The configuration with other values of `evaluate`."""
    settings = config.evaluate.model_copy(update=evaluate)
    return config.model_copy(update={"evaluate": settings})


@pytest.fixture(scope="module")
def config():
    return configured({"benchmarks": BENCHMARKS, "batch_tokens": 512})


@pytest.fixture(scope="module")
def scenes(config, tmp_path_factory):
    """Manifest of prepared data with 20 questions a benchmark."""
    out = tmp_path_factory.mktemp("scenes") / "manifest.json"
    prepare(config, "scenes", out)
    return out


@pytest.fixture(scope="module")
def questions(config, scenes):
    """Rows of each benchmark as the data hold them."""
    return {
        name: list(task.eval_docs)
        for name, task in load_benchmarks(config.evaluate, [scenes]).items()
    }


@pytest.fixture(scope="module")
def weights(backbone, tmp_path_factory):
    """A checkpoint as a training leaves it: untrained, with weights so large that what it says
    depends on every token it is shown; it falls silent after a few words."""
    model, processor = build(backbone, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.config.text_config.max_position_embeddings = 1024
    model.generation_config.exponential_decay_length_penalty = (6, 2.0)
    folder = tmp_path_factory.mktemp("weights")
    for part in (model, processor):
        part.save_pretrained(folder)
    return finished(folder)


def finished(folder: Path) -> Path:
    """A checkpoint that is marked as a training does it, for manifests of `trained`."""
    files = hashes(folder, folder.iterdir())
    write_json_atomic(folder / "done.json", {"weights_sha256": "abc", "files": files})
    return folder


@pytest.fixture
def trained(tmp_path):
    """Run manifest of a seed's finished last stage, with a given checkpoint."""

    def write(weights):
        manifest = {"ablation": "sts", "seed": 0, "stage": "instruct", "weights": str(weights)}
        manifest |= {"weights_sha256": "abc", "precision": "fp32"}
        (tmp_path / "instruct.json").write_text(json.dumps(manifest))
        return tmp_path / "instruct.json"

    return write


@pytest.fixture
def measure(config, scenes, trained, tmp_path, monkeypatch):
    """Evaluate an oracle; (the oracle, the result file's content)."""

    def run(reply, config=config, data=(scenes,)):
        oracle = reply if isinstance(reply, Oracle) else Oracle(reply)
        monkeypatch.setattr(module, "load_model", lambda *_: oracle)
        monkeypatch.setattr(module, "weights_of", Path)
        out = tmp_path / "eval.json"
        returned = evaluate(config, "sts", 0, trained("unused"), data, out)
        assert returned == read_json(out)
        return oracle, returned

    return run


@pytest.fixture
def answers(tmp_path):
    """Rows that the last evaluation kept of a benchmark."""

    def read(name):
        return [json.loads(line) for line in (tmp_path / f"samples/{name}.jsonl").open()]

    return read


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A copy of the folder of task files, which a test may add to."""
    folder = shutil.copytree(benchmarks.TASKS, tmp_path / "tasks")
    monkeypatch.setattr(benchmarks, "TASKS", folder)
    return folder


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    root = tmp_path_factory.mktemp("mirror")
    write_chartqa(root)
    write_mmmu(root, ART)
    return root


GROUP = "mmmu_val_art_and_design"


@pytest.fixture
def theirs(mirror):
    """Configuration of tasks of lm-eval, whose data lie in a mirror."""
    names = {"benchmarks": ["chartqa_llama", GROUP]}
    names["metrics"] = {"chartqa_llama": "relaxed_accuracy"}
    return configured(names, mirror=str(mirror))


def test_the_score_is_the_share_of_right_answers(measure, questions):
    rows = questions["existence"]
    truth = {(f"<image>\n{r['question']}", np.asarray(r["image"]).tobytes()): r["answer"]
             for r in rows + questions["colour"]}  # fmt: skip
    wrong = {np.asarray(row["image"]).tobytes() for row in rows[:5]}

    def reply(prompt, image):
        right = truth.get((prompt, image.tobytes()), "?")
        return "never" if image.tobytes() in wrong else f" {right.upper()}.\n"

    _, result = measure(reply)
    existence = result["benchmarks"]["existence"]
    assert existence["score"] == 0.75 and existence["n"] == 20
    assert existence["stderr"] == pytest.approx((0.75 * 0.25 / 19) ** 0.5)
    assert result["benchmarks"]["colour"]["score"] == 1
    assert existence["blind"] == 0  # the oracle does not know a grey image
    assert (result["ablation"], result["seed"], result["weights_sha256"]) == ("sts", 0, "abc")


def test_the_error_of_questions_about_one_picture_is_that_of_clusters():
    draw = np.random.default_rng(0)
    values, pictures = draw.random(40).tolist(), draw.integers(12, size=40).tolist()
    mean, number = np.mean(values), len(set(pictures))
    together = [
        (a - mean) * (b - mean)
        for a, first in zip(values, pictures, strict=True)
        for b, second in zip(values, pictures, strict=True)
        if first == second
    ]
    expected = (sum(together) * number / (number - 1)) ** 0.5 / 40
    assert clustered_error(values, pictures) == pytest.approx(expected)
    alone = clustered_error(values, range(40))
    assert alone == pytest.approx(np.std(values, ddof=1) / 40**0.5)
    # the same question six times about each picture says no more than once
    assert clustered_error(6 * values, 6 * [*range(40)]) == pytest.approx(alone)
    assert clustered_error(values, 40 * ["one picture"]) is None


@pytest.mark.parametrize(
    ("output", "right"),
    [("yes", True), (" Yes.", True), ("yes\n", True), ("yes no", False), ("y es", False),
     ("", False), ("...", False), ("yesterday", False)],
)  # fmt: skip
def test_case_space_and_punctuation_around_an_answer_do_not_count(config, scenes, output, right):
    task = load_benchmarks(config.evaluate, [scenes])["existence"]
    row = next(row for row in task.eval_docs if row["answer"] == "yes")
    assert task.process_results(row, [output]) == {"exact_match": right}


def test_every_question_is_asked_with_its_image_and_once_more_with_a_grey_one(measure, questions):
    oracle, _ = measure(lambda prompt, image: "yes")
    prompts = Counter(prompt for prompt, _, _ in oracle.shown)
    rows = questions["existence"] + questions["colour"]
    assert prompts == Counter(2 * [f"<image>\n{row['question']}" for row in rows])
    grey = [image for _, _, [image] in oracle.shown if (image == GREY).all()]
    assert len(grey) == len(oracle.shown) / 2 == 40
    assert {image.shape for _, _, [image] in oracle.shown} == {(72, 72, 3)}
    for _, settings, _ in oracle.shown:
        assert settings["do_sample"] is False and settings["max_gen_toks"] == 4


def test_blind_can_be_left_out(measure, config):
    oracle, result = measure(lambda prompt, image: "yes", varied(config, blind=0))
    assert len(oracle.shown) == 40 and result["benchmarks"]["existence"]["blind"] is None


def without_picture(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "picture"} for row in rows]


def test_a_share_of_the_questions_is_asked_in_grey(measure, config, answers):
    oracle, result = measure(lambda prompt, image: "yes", varied(config, blind=0.25))
    grey = [image for _, _, [image] in oracle.shown if (image == GREY).all()]
    assert (len(oracle.shown), len(grey)) == (2 * (20 + 5), 2 * 5)
    for name in BENCHMARKS:
        some, every = map(without_picture, (answers(f"{name}_blind"), answers(name)))
        assert len(some) == 5 and some == [row for row in every if row in some] != every[:5]
        entry = result["benchmarks"][name]
        assert (entry["blind"], entry["n"]) == (sum(row["correct"] for row in some) / 5, 20)


def test_majority_and_chance_are_taken_within_each_question_form():
    questions = [("yes/no", "yes")] * 3 + [("yes/no", "No")] + [("colour", c) for c in "abcd"]
    assert guesses(questions) == ((3 + 1) / 8, (4 * 0.5 + 4 * 0.25) / 8)


def test_the_result_holds_the_controls_and_how_it_was_measured(measure, questions):
    import lm_eval

    _, result = measure(lambda prompt, image: "yes")
    existence = result["benchmarks"]["existence"]
    assert existence["majority"] == pytest.approx(
        sum(
            max(Counter(r["answer"] for r in questions["existence"] if r["form"] == form).values())
            for form in {r["form"] for r in questions["existence"]}
        )
        / 20
    )
    assert existence["chance"] == 0.5 and existence["version"] == 1
    assert existence["metric"] == "exact_match" and existence["share"]
    assert result["lm_eval"] == lm_eval.__version__ and result["batch_tokens"] == 512


def test_every_answer_is_kept(measure, questions, answers, tmp_path):
    measure(lambda prompt, image: "yes")
    files = {file.stem for file in (tmp_path / "samples").iterdir()}
    assert files == {"existence", "existence_blind", "colour", "colour_blind"}
    for name in BENCHMARKS:
        seen, blind = answers(name), answers(f"{name}_blind")
        assert [row["picture"] for row in seen] == [
            sha256(np.asarray(row["image"]).tobytes()).hexdigest()[:16] for row in questions[name]
        ]
        assert len({row["picture"] for row in blind}) == 1, "all grey"
        assert without_picture(seen) == without_picture(blind) == [
            {"id": row["id"], "question": row["question"], "form": row["form"],
             "target": row["answer"], "output": "yes", "correct": row["answer"] == "yes"}
            for row in questions[name]
        ]  # fmt: skip
    assert json.loads((tmp_path / "eval" / "provenance.json").read_text())["samples"] == 80
    first = (tmp_path / "eval.json").read_bytes()
    measure(lambda prompt, image: "yes")
    assert (tmp_path / "eval.json").read_bytes() == first, "the same answers give the same bytes"


@pytest.mark.slow
def test_other_settings_are_another_mlflow_run(measure, config, tmp_path, monkeypatch):
    monkeypatch.setenv("STS_TRACKING", "on")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    for change in ({}, {}, {"batch_tokens": 9}):
        measure(lambda *_: "yes", varied(config, **change))
    runs = {file.read_text() for file in (tmp_path / "eval").glob("*/mlflow_run_id")}
    assert len(runs) == 2


def test_every_task_file_of_ours_asks_a_data_set_that_there_is():
    config = configured({"benchmarks": [*benchmarks.ours()]})  # else a ConfigError
    assert len(config.evaluate.benchmarks) >= 10
    assert config.evaluation_data() == ["scenes", "easy_vqa", "nlvr"]


def test_a_benchmark_without_data_is_named_with_the_fix(config, scenes, trained, tmp_path):
    ask = partial(evaluate, ablation="sts", seed=0, run=trained("unused"), out=tmp_path / "e.json")
    missing = varied(config, benchmarks=["existence", "nlvr"])
    with pytest.raises(
        FileNotFoundError, match=rf"'nlvr'.*'test_nlvr'.*{scenes}.*evaluate\.benchmarks"
    ):
        ask(missing, data=[scenes])
    with pytest.raises(FileNotFoundError, match=r"gone\.json: no such file. Run snakemake"):
        ask(config, data=["gone.json"])


def test_a_lost_data_file_is_named_with_the_fix(config, scenes, trained, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(scenes.parent, copy)
    (copy / "test_colour.arrow").unlink()
    with pytest.raises(SpoiltError, match=r"test_colour\.arrow: missing.*again"):
        evaluate(
            config, "sts", 0, trained("unused"), [copy / "manifest.json"], tmp_path / "eval.json"
        )


def test_lost_weights_are_named_and_not_looked_up_on_a_hub(config, scenes, trained, tmp_path):
    with pytest.raises(SpoiltError, match=r"lost/done.json: missing. Delete .*sts/seed0/instruct"):
        evaluate(config, "sts", 0, trained("weights/lost"), [scenes], tmp_path / "eval.json")


def test_other_bytes_than_those_that_were_trained_answer_nothing(
    config, scenes, weights, trained, tmp_path
):
    copy = shutil.copytree(weights, tmp_path / "results/weights/key")
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    with pytest.raises(SpoiltError, match=r"key/config.json: other bytes than were written"):
        evaluate(config, "sts", 0, trained(copy), [scenes], tmp_path / "eval.json")
    assert not (tmp_path / "eval.json").exists()
    assert not (tmp_path / "eval.json").exists()


def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the evaluation opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_real_checkpoint_answers_without_the_network(
    config, scenes, weights, trained, tmp_path, answers, monkeypatch
):
    offline(monkeypatch)
    result = evaluate(config, "dense", 1, trained(weights), [scenes], tmp_path / "eval.json")
    for name in BENCHMARKS:
        rows = answers(name)
        assert result["benchmarks"][name]["score"] == np.mean([row["correct"] for row in rows])
        assert len(rows) == 20


def test_the_size_of_batches_changes_no_answer_in_float32(weights, trained, tmp_path, answers):
    """Of one question and of all, most of them padded on the left; lengths are mixed."""
    words = 4 * "is there a red circle to the left of the blue square ?".split()  # noqa: SIM905
    rows = [
        {"id": str(i), "image": picture(i, size=(64, 64)), "question": " ".join(words[i % 7 : i]),
         "answer": "yes", "form": "any"}
        for i in range(8, 40)
    ]  # fmt: skip
    columns = dict.fromkeys(["id", "question", "answer", "form"], datasets.Value("string"))
    data = tmp_path / "data"
    write_arrow(rows, {**columns, "image": datasets.Image()}, data / "questions.arrow")
    splits = {"test_existence": {"file": "questions.arrow"}}
    manifest = {"dataset": "scenes", "splits": splits, "files": hashes(data, data.glob("*.arrow"))}
    (data / "manifest.json").write_text(json.dumps(manifest))
    outputs = []
    for size in (1, 1200, 10**6):
        config = configured({"benchmarks": ["existence"], "batch_tokens": size, "blind": 0})
        evaluate(
            config, "dense", 1, trained(weights), [data / "manifest.json"], tmp_path / "eval.json"
        )
        outputs.append([row["output"] for row in answers("existence")])
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(set(outputs[0])) > 10, "answers that are all the same would prove nothing"


def test_a_limit_asks_the_same_part_of_the_questions_with_and_without_images(
    config, measure, answers
):
    def ids(limit, name):
        _, result = measure(lambda *_: "yes", varied(config, limit=limit))
        assert {row["n"] for row in result["benchmarks"].values()} == {min(limit or 20, 20)}
        return [row["id"] for row in answers(name)]

    every, some = ids(None, "colour"), ids(7, "colour")
    assert len(some) == 7 and some == [id for id in every if id in some] != every[:7]
    assert ids(7, "colour_blind") == some
    assert ids(50, "colour") == every
    assert set(some) < set(ids(9, "colour")), "fewer are a part of more"


# ---- what doesn't fit, what was interrupted, and several processes -------------------------------


def test_a_question_that_does_not_fit_is_wrong_and_said_and_the_rest_goes_on(
    measure, answers, caplog
):
    oracle = Oracle(lambda *_: "yes")
    oracle.max_length = 4 + len("<image>\nis there a red circle?")
    _, result = measure(oracle)
    entry, rows = result["benchmarks"]["existence"], answers("existence")
    long = [row for row in rows if "note" in row]
    assert 0 < len(long) == entry["too_long"] < entry["n"] == len(rows)
    assert {(row["output"], row["correct"], row["note"]) for row in long} == {
        ("", False, NOT_ASKED)
    }
    asked = {prompt for prompt, *_ in oracle.shown}
    assert asked == {f"<image>\n{row['question']}" for name in BENCHMARKS for row in answers(name)
                     if "note" not in row}  # fmt: skip
    assert entry["score"] == np.mean([row["correct"] for row in rows])
    message = f"existence: {len(long)} of 20 questions don't fit into the model's context"
    assert caplog.text.count(message) == 1


class Together(Oracle):
    """What it says depends on all that it is asked at once; stops before one batch more."""

    def __init__(self, batches=-1):
        super().__init__(lambda *_: "")
        self.left = batches

    def generate_until(self, requests, disable_tqdm=False):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        super().generate_until(requests)
        return len(requests) * [sha256_json(sorted(request.args[0] for request in requests))]


def test_what_was_interrupted_asks_what_is_missing_in_the_same_batches(
    measure, config, answers, tmp_path, monkeypatch
):
    monkeypatch.setattr(asking, "AT_ONCE", 30)
    _, uncut = measure(Together())
    expected = [answers(name) for name in BENCHMARKS]
    total = len(answers("existence_blind")) * 4
    for batches in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            measure(Together(batches))
    [kept] = tmp_path.glob("eval/*/answers0.jsonl")
    with kept.open("a") as file:
        file.write('[[["existence", "sts_exis')  # torn
    with pytest.raises(KeyboardInterrupt):
        measure(Together(0), varied(config, max_new_tokens=5))  # other answers
    oracle, result = measure(Together())
    assert [answers(name) for name in BENCHMARKS] == expected and result == uncut
    facts = read_json(tmp_path / "eval/provenance.json")
    assert 0 < facts["kept"] == total - len(oracle.shown)
    assert not kept.exists(), "kept until there is a result"


# Evaluates, and dies before a batch if its number is given
WORKER = """
import os, signal, sys
from sts.pipeline.config import Config
from sts.pipeline.evaluate import asking
from sts.pipeline.evaluate.evaluate import evaluate

asking.AT_ONCE, left = 10, int(sys.argv[5])
generate = asking._Model.generate_until

def generate_until(self, requests, **options):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return generate(self, requests, **options)

asking._Model.generate_until = generate_until
config = Config.model_validate_json(sys.argv[1])
evaluate(config, "dense", 1, sys.argv[2], [sys.argv[3]], sys.argv[4])
"""


@pytest.mark.slow
def test_killed_processes_and_one_that_goes_on_give_what_one_gives(
    config, scenes, weights, trained, tmp_path, monkeypatch
):
    script, run = tmp_path / "worker.py", trained(weights)
    script.write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(PAGE.parents[1]), prepend=os.pathsep)
    monkeypatch.setattr(asking, "AT_ONCE", 10)

    def by_two(out, dies):
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
        settings = varied(config, processes=2).model_dump_json(by_alias=True)
        arguments = [settings, run, scenes, tmp_path / out / "eval.json", dies]
        command = [sys.executable, "-m", *map(str, launcher + arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    def by_one(out):
        evaluate(config, "dense", 1, run, [scenes], tmp_path / out / "eval.json")

    def files(out):
        names = ("eval.json", *(f"samples/{name}.jsonl" for name in BENCHMARKS))
        return [(tmp_path / out / name).read_bytes() for name in names]

    by_one("uncut")
    done = by_two("two", dies=-1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files("two") == files("uncut")
    assert by_two("killed", dies=2).returncode != 0
    kept = sorted(file.name for file in tmp_path.glob("killed/eval/*/*"))
    assert kept == ["answers0.jsonl", "answers1.jsonl"] and not [*tmp_path.glob("killed/*.json")]
    by_one("killed")
    assert files("killed") == files("uncut")
    facts = [read_json(tmp_path / out / "eval/provenance.json") for out in ("uncut", "killed")]
    assert facts[0]["kept"] == 0 < facts[1]["kept"] < facts[1]["samples"] == facts[0]["samples"]
    with pytest.raises(ValueError, match=r"evaluate\.processes: the configuration says 2.*with 1"):
        evaluate(varied(config, processes=2), "dense", 1, run, [scenes], tmp_path / "eval.json")


# ---- benchmarks of one's own ------------------------------------------------------------------


def test_a_benchmark_is_added_by_the_page_alone(tasks, measure, questions, answers, scenes):
    [(file, text)] = re.findall(r"`(sts/pipeline/tasks/\w+\.yaml)`:\n+```yaml\n(.*?)```",
                                PAGE.read_text(), re.DOTALL)  # fmt: skip
    name = Path(file).stem
    (tasks / f"{name}.yaml").write_text(text)
    config = configured({"benchmarks": ["colour", name]})
    assert config.evaluation_data() == ["scenes"]
    sources = {path.name for path in benchmarks.sources([name])}
    assert sources == {f"{name}.yaml", "_base.yaml", "benchmark.py"}
    oracle, result = measure(lambda *_: "red", config)
    assert result["benchmarks"][name]["score"] == result["benchmarks"]["colour"]["score"] > 0
    assert answers(name) == answers("colour")
    prompts = {prompt for prompt, *_ in oracle.shown}
    assert len(prompts) == 2 * len({row["question"] for row in questions["colour"]}), (
        "its own words"
    )


COUNTED = """
include: _base.yaml
task: sts_counted
dataset_kwargs: {dataset: scenes, split: test_colour}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: !function counted.letters, aggregation: mean, higher_is_better: true}
  - {metric: !function counted.misses, aggregation: mean, higher_is_better: false}
"""
LETTERS = """
def letters(references, predictions): return {"letters": len(predictions[0])}
def misses(references, predictions): return {"misses": references != predictions}
"""


def test_a_score_that_is_no_share_is_kept_and_said(tasks, measure, answers, caplog):
    (tasks / "counted.yaml").write_text(COUNTED)
    (tasks / "counted.py").write_text(LETTERS)
    config = configured({"benchmarks": ["counted"], "metrics": {"counted": "letters"}})
    _, result = measure(lambda prompt, image: "red" if "shape" in prompt else "never", config)
    row = result["benchmarks"]["counted"]
    assert row["metric"] == "letters" and row["share"] is False and 3 <= row["score"] <= 5
    assert row["score"] == np.mean([answer["correct"] for answer in answers("counted")])
    assert "counted: letters is not a share of 0 to 1" in caplog.text
    _, result = measure(lambda *_: "red", varied(config, metrics={}))
    assert result["benchmarks"]["counted"]["metric"] == "exact_match", "the first"


def test_a_metric_that_its_task_does_not_give_is_named(tasks, measure):
    (tasks / "counted.yaml").write_text(COUNTED)
    (tasks / "counted.py").write_text(LETTERS.replace('{"letters"', '{"length"'))
    config = configured({"benchmarks": ["counted"], "metrics": {"counted": "letters"}})
    with pytest.raises(ValueError, match=r"counted: its task gave no letters, but .*length,none"):
        measure(lambda *_: "red", config)


@pytest.mark.parametrize(
    ("metric", "accepted"),
    [("bleu", "exact_match, letters, misses"), ("misses", "a higher value is better")],
)
def test_a_metric_that_is_none_is_refused_before_the_model(
    tasks, trained, scenes, tmp_path, metric, accepted
):
    (tasks / "counted.yaml").write_text(COUNTED)
    (tasks / "counted.py").write_text(LETTERS)
    with pytest.raises(ConfigError, match=rf"metrics\.counted: '{metric}'.*{accepted}"):
        config = configured({"benchmarks": ["counted"], "metrics": {"counted": metric}})
        evaluate(config, "sts", 0, trained("no/model"), [scenes], tmp_path / "eval.json")


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ("{benchmark: colour}", ValueError, r"odd\.yaml: dataset_kwargs must name.*split"),
        ("{dataset: scenes, split: test_x}", FileNotFoundError, r"no split 'test_x', but .*test_"),
    ],
)
def test_a_task_file_that_asks_nothing_is_refused(tasks, scenes, kwargs, error, words):
    text = f"include: _base.yaml\ntask: sts_odd\ndataset_kwargs: {kwargs}\n"
    (tasks / "odd.yaml").write_text(text)
    with pytest.raises(error, match=words):
        load_benchmarks(configured({"benchmarks": ["odd"]}).evaluate, [scenes])


def test_a_task_file_of_an_unknown_data_set_is_refused_with_the_configuration(tasks):
    text = "include: _base.yaml\ntask: x\ndataset_kwargs: {dataset: lost, split: test}\n"
    (tasks / "astray.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"evaluate\.benchmarks: 'astray'.*scenes.*not lost"):
        configured({"benchmarks": ["astray"]})


# ---- lm-eval's own tasks ----------------------------------------------------------------------


def test_tasks_and_groups_of_lm_eval_are_found_by_name():
    assert benchmarks.file_of("chartqa_llama").name == "chartqa_llama.yaml"
    assert benchmarks.file_of("mmmu_val").name == "_mmmu.yaml"
    assert benchmarks.dataset_of("mmmu_val") is None
    config = configured({"benchmarks": ["mmmu_val", "chartqa_llama", "text"]})
    assert config.evaluation_data() == ["scenes"]
    with pytest.raises(ConfigError, match=r"'chartqx'.*chart, .*lm-eval.*such as mmmu_val"):
        configured({"benchmarks": ["chartqx"]})
    with pytest.raises(ConfigError, match=r"evaluate\.metrics\.chartqx"):
        configured({"benchmarks": ["text"], "metrics": {"chartqx": "acc"}})


@pytest.mark.parametrize(
    ("name", "metric", "accepted"),
    [
        ("chartqa", "relaxed", "one of relaxed_accuracy"),
        ("mme_cognition", "circular", "one of score, accuracy"),
        ("chartqa_llama", "relaxed", "one of exact_match, relaxed_accuracy, anywhere_accuracy"),
        ("mmmu_val", "bleu", "one of acc"),
    ],
)
def test_a_metric_that_a_task_file_does_not_list_is_refused_with_the_configuration(
    name, metric, accepted
):
    with pytest.raises(ConfigError, match=rf"evaluate\.metrics\.{name}: '{metric}'.*{accepted}"):
        configured({"benchmarks": [name], "metrics": {name: metric}})


def test_a_metric_that_the_plan_cannot_know_is_refused_with_the_data(theirs, tmp_path):
    """Where lm-eval is not installed, as beside Snakemake, the first job that has it says so."""
    wrong = varied(theirs, metrics={GROUP: "bleu"})
    with pytest.raises(ConfigError, match=rf"metrics\.{GROUP}: 'bleu'.*one of acc"):
        fetch(wrong, GROUP, tmp_path / "manifest.json")


def test_where_lm_eval_is_not_installed_the_job_decides(monkeypatch, scenes):
    with monkeypatch.context() as bare:
        bare.setattr(benchmarks, "find_spec", lambda name: None)
        benchmarks._lm_evals.cache_clear()
        config = configured({"benchmarks": ["text", "chartqx"]})
        benchmarks._lm_evals.cache_clear()
    with pytest.raises(ConfigError, match="'chartqx'"):
        load_benchmarks(config.evaluate, [scenes])


def test_lm_evals_tasks_are_scored_by_their_own_metrics(measure, theirs, answers):
    """The oracle reads the value within 5 %, then the letter of the group's first kind."""

    def reply(prompt, *images):
        if "value" in prompt:
            number = int(re.search(r"value (\d)", prompt)[1])
            return f"it is so. Final Answer: {100 + number + 3 * (number > 1)}"
        return "(B)" if "(A)" in prompt else "nothing"

    oracle, result = measure(reply, theirs, data=())
    chart, group = (result["benchmarks"][name] for name in ("chartqa_llama", GROUP))
    assert (chart["metric"], chart["score"], chart["n"]) == ("relaxed_accuracy", 1, 4)
    assert (group["metric"], group["n"], group["version"]) == ("acc", 12, "0.0")
    choices = "<image> or <image>?\n\n(A) red\n(B) blue"
    prompts = {prompt for prompt, *_ in oracle.shown}
    assert f"{choices}\n\n{official.LETTER}" in prompts, "MMMU's own for LLaVA-1.5"
    assert f"what is <image>?\n\n{official.WORD}" in prompts
    assert group["score"] == pytest.approx(1 / 3) and group["share"]
    assert {chart["majority"], chart["chance"], group["majority"], group["chance"]} == {None}
    assert without_picture(answers("chartqa_llama"))[3] == {
        "id": "chartqa_llama/3", "question": next(p for p, *_ in oracle.shown if "value 3" in p),
        "form": None, "target": "103", "output": "it is so. Final Answer: 106", "correct": True,
    }  # fmt: skip
    assert [row["correct"] for row in answers(GROUP)] == 4 * [True, False, False]
    assert len({row["id"] for row in answers(GROUP)}) == 12
    _, result = measure(reply, varied(theirs, metrics={}), data=())
    chart = result["benchmarks"]["chartqa_llama"]
    assert (chart["metric"], chart["score"]) == ("exact_match", 0.5), "its first metric"


def test_lm_evals_tasks_keep_their_limit_of_words_and_get_grey_images(measure, theirs):
    oracle, _ = measure(lambda *_: "(A)", theirs, data=())
    assert {settings["max_gen_toks"] for _, settings, _ in oracle.shown} == {512}
    questions = {True: Counter(), False: Counter()}
    for prompt, _, images in oracle.shown:
        [is_blind] = {bool((image == GREY).all()) for image in images}
        assert len(images) == prompt.count("<image>") > 0
        questions[is_blind][prompt, *(image.shape[:2] for image in images)] += 1
    assert questions[True] == questions[False]


def test_a_limit_is_of_a_whole_group(measure, theirs, answers):
    _, result = measure(lambda *_: "(A)", varied(theirs, limit=5), data=())
    assert [result["benchmarks"][name]["n"] for name in ("chartqa_llama", GROUP)] == [4, 5]
    ids = [row["id"] for row in answers(GROUP)]
    assert ids == [row["id"] for row in answers(f"{GROUP}_blind")] and len(set(ids)) == 5


def test_a_guess_of_lm_evals_is_the_same_in_every_evaluation(measure, theirs, answers):
    """MMMU's task draws a letter where it finds none in the answer."""
    runs = []
    for _ in range(2):
        measure(lambda *_: "well", theirs, data=())
        runs.append(answers(GROUP) + answers(f"{GROUP}_blind"))
    assert runs[0] == runs[1]


def test_a_real_checkpoint_answers_lm_evals_tasks_from_the_command_line(
    theirs, mirror, weights, trained, tmp_path, answers, monkeypatch
):
    offline(monkeypatch)
    config, run, out = tmp_path / "config.yaml", trained(weights), tmp_path / "eval.json"
    config.write_text(dump(theirs))
    place = ["--ablation", "dense", "--seed", "0", "--out", str(out)]
    assert main(["evaluate", "--config", str(config), "--run", str(run), "--data", *place]) == 0
    for name, row in json.loads(out.read_text())["benchmarks"].items():
        assert row["n"] == len(answers(name)) == len(answers(f"{name}_blind"))
        assert 0 <= row["score"] <= 1 and 0 <= row["blind"] <= 1
        assert all(answer["output"] for answer in answers(name))


def test_a_real_checkpoint_is_not_asked_what_is_too_long_for_it(
    theirs, backbone, trained, tmp_path, answers
):
    """The answers of these tasks alone may have 512 tokens, of 256."""
    for part in build(backbone, seed=0):
        part.save_pretrained(tmp_path / "short")
    run = trained(finished(tmp_path / "short"))
    result = evaluate(theirs, "dense", 1, run, [], tmp_path / "eval.json")
    for name, entry in result["benchmarks"].items():
        assert entry["score"] == entry["blind"] == 0 and entry["too_long"] == entry["n"] > 0
        assert {row["note"] for row in answers(name)} == {NOT_ASKED}


def test_data_of_lm_evals_that_cant_be_had_are_named_with_the_fix(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    config = configured({"benchmarks": ["chartqa_llama"]})
    words = (
        r"chartqa_llama: its data set HuggingFaceM4/ChartQA can't be had.*hf download "
        r"HuggingFaceM4/ChartQA --repo-type dataset.*STS_DATA_MIRROR.*evaluate\.benchmarks.*HF_HOME"
    )
    with pytest.raises(DataError, match=words):
        evaluate(config, "sts", 0, trained("no/model"), [], tmp_path / "eval.json")


def test_a_task_without_images_is_refused_before_its_data_are_fetched(monkeypatch):
    offline(monkeypatch)
    with pytest.raises(ConfigError, match=r"'hellaswag'.*doc_to_image"):
        load_benchmarks(configured({"benchmarks": ["hellaswag"]}).evaluate, [])
