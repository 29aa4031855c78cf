"""Scores are the share of right answers; the controls are what they claim to be."""

import json
import shutil
import socket
from collections import Counter

import numpy as np
import pytest
from lm_eval.api.model import LM

from sts.mini.backbone import build_llava
from sts.pipeline import evaluate as module
from sts.pipeline.config import validate
from sts.pipeline.data.prepare import prepare
from sts.pipeline.evaluate import TASKS, evaluate, guesses, load_tasks

BENCHMARKS = ["existence", "colour"]
GREY = 128


class Oracle(LM):
    """Answers what `reply(question, image)` says; remembers what it was shown."""

    MULTIMODAL = True
    tokenizer_name = "oracle"

    def __init__(self, reply):
        super().__init__()
        self.reply, self.shown = reply, []

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return chat_history[-1]["content"]

    def generate_until(self, requests, disable_tqdm=False):
        for prompt, settings, extra in (request.args for request in requests):
            [image] = extra["visual"]
            self.shown.append((prompt, settings, np.asarray(image)))
        return [self.reply(prompt, image) for prompt, _, image in self.shown]

    def loglikelihood(self, requests):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("STS_TRACKING", "off")


@pytest.fixture(scope="module")
def config():
    return validate(
        {
            "data": {"scenes": {"seed": 5, "align": 4, "instruct": 4, "test": 20}},
            "evaluate": {"benchmarks": BENCHMARKS, "batch_size": 8},
        },
        "test.yaml",
    )


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
        name: [row for row in task.eval_docs]
        for name, task in load_tasks(config.evaluate, [scenes]).items()
    }


@pytest.fixture(scope="module")
def weights(backbone, tmp_path_factory):
    """A checkpoint as a training leaves it: untrained, so that it says nonsense."""
    folder = tmp_path_factory.mktemp("weights")
    for part in build_llava(backbone, seed=0):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def trained(tmp_path):
    """Run manifest of a seed's finished instruct stage, with a given checkpoint."""

    def write(weights):
        manifest = {"weights": str(weights), "weights_sha256": "abc"}
        (tmp_path / "instruct.json").write_text(json.dumps(manifest))
        return tmp_path / "instruct.json"

    return write


@pytest.fixture
def measure(config, scenes, trained, tmp_path, monkeypatch):
    """Evaluate an oracle; (the oracle, the result file's content)."""

    def run(reply, config=config):
        oracle = Oracle(reply)
        monkeypatch.setattr(module, "load_model", lambda *_: oracle)
        out = tmp_path / "eval.json"
        returned = evaluate(config, "sts", 0, trained("unused"), [scenes], out)
        assert returned == json.loads(out.read_text())
        return oracle, returned

    return run


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


@pytest.mark.parametrize(
    ("output", "right"),
    [("yes", True), (" Yes.", True), ("yes\n", True), ("yes no", False), ("y es", False),
     ("", False), ("...", False), ("yesterday", False)],
)  # fmt: skip
def test_case_space_and_punctuation_around_an_answer_do_not_count(measure, output, right):
    _, result = measure(lambda prompt, image: output)
    assert (result["benchmarks"]["existence"]["score"] > 0) == right


def test_every_question_is_asked_with_its_image_and_once_more_with_a_grey_one(measure, questions):
    oracle, _ = measure(lambda prompt, image: "yes")
    asked = Counter(prompt for prompt, _, _ in oracle.shown)
    rows = questions["existence"] + questions["colour"]
    assert asked == Counter(2 * [f"<image>\n{row['question']}" for row in rows])
    grey = [image for _, _, image in oracle.shown if (image == GREY).all()]
    assert len(grey) == len(oracle.shown) / 2 == 40
    assert {image.shape for _, _, image in oracle.shown} == {(64, 64, 3)}


def test_decoding_is_greedy_and_as_long_as_configured(measure):
    oracle, _ = measure(lambda prompt, image: "yes")
    for _, settings, _ in oracle.shown:
        assert settings["do_sample"] is False and settings["max_gen_toks"] == 4


def test_blind_can_be_left_out(measure, config):
    settings = config.evaluate.model_copy(update={"blind": False})
    oracle, result = measure(
        lambda prompt, image: "yes", config.model_copy(update={"evaluate": settings})
    )
    assert len(oracle.shown) == 40 and result["benchmarks"]["existence"]["blind"] is None


def test_majority_and_chance_are_taken_within_each_question_form():
    questions = [("yes/no", "yes")] * 3 + [("yes/no", "No")] + [("colour", c) for c in "abcd"]
    assert guesses(questions) == ((3 + 1) / 8, (4 * 0.5 + 4 * 0.25) / 8)


def test_the_result_holds_the_controls_and_the_versions(measure, questions):
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
    assert result["lm_eval"] == lm_eval.__version__


def test_every_answer_is_kept(measure, questions, tmp_path):
    measure(lambda prompt, image: "yes")
    kept = {file.stem: [json.loads(line) for line in file.read_text().splitlines()]
            for file in (tmp_path / "samples").iterdir()}  # fmt: skip
    assert set(kept) == {"existence", "existence_blind", "colour", "colour_blind"}
    for name in BENCHMARKS:
        assert kept[name] == kept[f"{name}_blind"] == [
            {"id": row["id"], "question": row["question"], "form": row["form"],
             "target": row["answer"], "output": "yes", "correct": row["answer"] == "yes"}
            for row in questions[name]
        ]  # fmt: skip
    assert json.loads((tmp_path / "eval" / "provenance.json").read_text())["samples"] == 80


def test_the_same_answers_give_the_same_bytes(measure, tmp_path):
    measure(lambda prompt, image: "yes")
    first = (tmp_path / "eval.json").read_bytes()
    measure(lambda prompt, image: "yes")
    assert (tmp_path / "eval.json").read_bytes() == first


def test_other_settings_are_another_mlflow_run(measure, config, tmp_path, monkeypatch):
    monkeypatch.setenv("STS_TRACKING", "on")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    longer = config.evaluate.model_copy(update={"max_new_tokens": 5})
    for settings in (config.evaluate, config.evaluate, longer):
        measure(lambda *_: "yes", config.model_copy(update={"evaluate": settings}))
    runs = {file.read_text() for file in (tmp_path / "eval").glob("*/mlflow_run_id")}
    assert len(runs) == 2


def test_every_task_file_names_its_own_benchmark():
    files = [file for file in TASKS.glob("*.yaml") if file.stem != "_base"]
    assert len(files) >= 10
    for file in files:
        text = file.read_text()
        assert f"task: sts_{file.stem}\n" in text
        assert f"dataset_kwargs: {{benchmark: {file.stem}}}\n" in text


def test_a_benchmark_without_data_is_named_with_the_fix(config, scenes, trained, tmp_path):
    settings = config.evaluate.model_copy(update={"benchmarks": ["existence", "nlvr"]})
    missing = config.model_copy(update={"evaluate": settings})
    with pytest.raises(FileNotFoundError, match=rf"'test_nlvr'.*{scenes}.*evaluate\.benchmarks"):
        evaluate(missing, "sts", 0, trained("unused"), [scenes], tmp_path / "eval.json")
    with pytest.raises(FileNotFoundError, match=r"gone\.json: no such data manifest.*prepare"):
        evaluate(config, "sts", 0, trained("unused"), ["gone.json"], tmp_path / "eval.json")


def test_a_lost_data_file_is_named_with_the_fix(config, scenes, trained, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(scenes.parent, copy)
    (copy / "test_colour.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_colour\.parquet: missing.*again"):
        evaluate(
            config, "sts", 0, trained("unused"), [copy / "manifest.json"], tmp_path / "eval.json"
        )


def test_lost_weights_are_named_and_not_looked_up_on_a_hub(config, scenes, trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights/lost: no checkpoint.*train"):
        evaluate(config, "sts", 0, trained("weights/lost"), [scenes], tmp_path / "eval.json")
    assert not (tmp_path / "eval.json").exists()


def test_a_real_checkpoint_answers_without_the_network(
    config, scenes, weights, trained, tmp_path, monkeypatch
):
    def refuse(*_):
        raise AssertionError("the evaluation opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    result = evaluate(config, "dense", 1, trained(weights), [scenes], tmp_path / "eval.json")
    for name in BENCHMARKS:
        rows = [json.loads(line) for line in (tmp_path / f"samples/{name}.jsonl").open()]
        assert result["benchmarks"][name]["score"] == np.mean([row["correct"] for row in rows])
        assert len(rows) == 20


def test_the_batch_size_changes_no_answer(config, scenes, weights, trained, tmp_path):
    answers = []
    for size in (3, 40):
        settings = config.evaluate.model_copy(update={"batch_size": size})
        varied = config.model_copy(update={"evaluate": settings})
        evaluate(varied, "dense", 1, trained(weights), [scenes], tmp_path / "eval.json")
        answers.append((tmp_path / "samples" / "existence.jsonl").read_text())
    assert answers[0] == answers[1]


def test_a_limit_asks_the_same_part_of_the_questions_with_and_without_images(
    config, scenes, weights, trained, tmp_path
):
    def ids(limit, name):
        settings = config.evaluate.model_copy(update={"limit": limit})
        varied = config.model_copy(update={"evaluate": settings})
        result = evaluate(varied, "dense", 1, trained(weights), [scenes], tmp_path / "eval.json")
        assert {row["n"] for row in result["benchmarks"].values()} == {min(limit or 20, 20)}
        rows = (tmp_path / f"samples/{name}.jsonl").read_text().splitlines()
        return [json.loads(row)["id"] for row in rows]

    every, some = ids(None, "colour"), ids(7, "colour")
    assert len(some) == 7 and some == [id for id in every if id in some] != every[:7]
    assert ids(7, "colour_blind") == some
    assert ids(50, "colour") == every
