"""Files for servers that know the answers: in their form, and asked as it is for a score."""

import io
import json
import os

import datasets
import pandas as pd
import pytest
from asking import Oracle
from configs import RECIPE
from hub_sets import write_sets

from sts.__main__ import main
from sts.pipeline.command import INTERRUPTED
from sts.pipeline.config import dump, validate
from sts.pipeline.evaluate import asking, submission
from sts.pipeline.tasks import official

TEXT, IMAGE, NUMBER = datasets.Value("string"), datasets.Image(), datasets.Value("int64")
ANSWERS = datasets.List({"answer": TEXT, "answer_id": NUMBER})
QUESTION = {"question_id": NUMBER, "question": TEXT, "image": IMAGE}
LETTERS = {letter: TEXT for letter in "ABCDE"}
# data set -> configuration -> split -> (columns, rows); as the hub's, without any answer
SETS = {
    "lmms-lab/VQAv2": {"default": {"testdev": (
        QUESTION | {"answers": ANSWERS, "multiple_choice_answer": TEXT},
        [{"question_id": 262144000 + i, "question": f"say {word}"}
         for i, word in enumerate(["Two", "the dog", "red.", "a", "5"])],
    )}},
    "lmms-lab/VizWiz-VQA": {"default": {"test": (
        QUESTION | {"question_id": TEXT, "answers": datasets.List(TEXT)},
        [{"question_id": "VizWiz_test_00000000", "question": "say The Cup"}],
    )}},
    "lmms-lab/MMBench": {name: {"test": (
        {"index": NUMBER, "question": TEXT, "hint": TEXT, "answer": TEXT, "image": IMAGE,
         "category": TEXT, **LETTERS},
        [{"index": 3, "question": "say A", "hint": "nan", "A": "x\ty", "B": "z", "C": "nan",
          "category": "ocr"},
         {"index": 1_000_003, "question": "say B.", "hint": "Look.", "A": "z", "B": "x\ty",
          "category": "ocr"}],
    )} for name in ("en", "cn")},
}  # fmt: skip


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("mirror"), SETS, words=False)


def says(prompt, *_):
    """What a question asks for: all that follows `say` in its line."""
    (line,) = [line for line in prompt.splitlines() if line.lower().startswith("say ")]
    return line[4:]


@pytest.fixture
def ask(mirror, tmp_path, monkeypatch):
    """ask(benchmark, ...): (status, oracle, file) of the verb, with an oracle for the weights."""
    monkeypatch.delenv("STS_DATA_MIRROR", raising=False)
    scale = {
        "stages": {"instruct": RECIPE | {"trains": ["projector"]}},
        "data": {"mirror": str(mirror)},
        "evaluate": {"benchmarks": ["colour"], "limit": 1},
    }
    (tmp_path / "config.yaml").write_text(dump(validate(scale, "test.yaml")))

    def call(benchmark, *more, reply=says, weights="abc"):
        run, out = tmp_path / "instruct.json", tmp_path / "new" / "out"
        run.write_text(
            json.dumps({"weights": "unused", "weights_sha256": weights, "precision": "fp32"})
        )
        oracle = Oracle(reply)
        monkeypatch.setattr(submission, "load_model", lambda *_: oracle)
        monkeypatch.setattr(submission, "weights_of", lambda run: run)
        command = ["submission", "--benchmark", benchmark, "--run", str(run), "--out", str(out)]
        status = main([*command, "--config", str(tmp_path / "config.yaml"), *map(str, more)])
        return status, oracle, out

    return call


@pytest.fixture
def questions(tmp_path):
    """A file of VQA's with more questions than are asked."""

    def write(*ids):
        file = tmp_path / "questions.json"
        listed = [{"question_id": id, "question": "?", "image_id": 1} for id in ids]
        file.write_text(json.dumps({"info": {}, "questions": listed}))
        return file

    return write


ALL = [7, *range(262144000, 262144005), 9]
SAID = {262144000: "2", 262144001: "dog", 262144002: "red", 262144003: "", 262144004: "5"}


# ---- what is written, by hand -------------------------------------------------------------------


def test_vqa_is_a_list_of_question_id_and_answer():
    """As visualqa.org/evaluation.html has it: an int and a text."""
    rows = [{"question_id": 1}, {"question_id": "2"}]
    answers = json.loads(submission.vqa(rows, ["Yes.", "The two dogs"], []))
    assert answers == [{"question_id": 1, "answer": "yes"}, {"question_id": 2, "answer": "2 dogs"}]
    filled = json.loads(submission.vqa(rows[:1], ["Yes."], [3, 1]))
    assert filled == [{"question_id": 3, "answer": ""}, {"question_id": 1, "answer": "yes"}]


@pytest.mark.parametrize("id", ["VizWiz_test_00000000", "VizWiz_test_00000000.jpg"])
def test_vizwiz_is_a_list_of_image_and_answer(id):
    answers = json.loads(submission.vizwiz([{"question_id": id}], ["Unanswerable."], []))
    assert answers == [{"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"}]


# ---- asked through lm-eval, on files of the form of the hub's -----------------------------------


def test_vqav2_has_an_answer_to_every_question_of_the_servers(ask, questions):
    status, oracle, out = ask("vqav2_testdev", "--questions", questions(*ALL))
    assert status == 0
    answers = json.loads(out.read_text())
    assert [item["question_id"] for item in answers] == ALL
    assert {item["question_id"]: item["answer"] for item in answers} == {7: "", 9: ""} | SAID
    assert {prompt for prompt, *_ in oracle.shown} == {
        f"<image>\nsay {word}\n{official.WORD}" for word in ("Two", "the dog", "red.", "a", "5")
    }, "as for a score, and all of them whatever the limit"
    assert all(images[0].std() > 0 for *_, images in oracle.shown)


def test_vizwiz_is_asked_as_for_a_score(ask):
    status, oracle, out = ask("vizwiz_test")
    assert status == 0
    assert json.loads(out.read_text()) == [
        {"image": "VizWiz_test_00000000.jpg", "answer": "cup"}
    ]  # fmt: skip
    assert official.UNKNOWN in oracle.shown[0][0]


@pytest.mark.parametrize("language", ["en", "cn"])
def test_mmbench_is_a_table_of_its_questions_with_a_prediction(ask, language):
    status, oracle, out = ask(f"mmbench_{language}_test")
    assert status == 0
    table = pd.read_csv(io.StringIO(out.read_text()), sep="\t")
    assert list(table["index"]) == [3, 1_000_003]
    assert list(table["prediction"]) == ["A", "B."], "what was said as it is"
    assert list(table["A"]) == ["x\ty", "z"] and list(table["hint"].isna()) == [True, False]
    assert table[["answer", "C", "D", "E"]].isna().all(axis=None)
    assert set(table) == {"index", "question", "hint", *"ABCDE", "answer", "category", "prediction"}
    assert ("请" in oracle.shown[0][0]) == (language == "cn")


# ---- what goes wrong ----------------------------------------------------------------------------


def test_an_interrupted_call_goes_on_where_it_was(ask, questions, mirror, monkeypatch):
    monkeypatch.setattr(asking, "AT_ONCE", 2)
    more = ["--questions", questions(*ALL)]
    _, uncut, out = ask("vqav2_testdev", *more)
    assert uncut.at_once == [2, 2, 1]
    expected = out.read_bytes()
    out.unlink()

    def stops(prompt, *_):
        if "red" in prompt:
            raise KeyboardInterrupt
        return says(prompt)

    assert ask("vqav2_testdev", *more, reply=stops)[0] == INTERRUPTED
    assert not out.exists()
    _, other, _ = ask("vqav2_testdev", *more, weights="def")
    assert len(other.shown) == 5, "other weights answer anew"
    assert ask("vqav2_testdev", *more, reply=stops)[0] == INTERRUPTED
    [file] = mirror.glob("lmms-lab/VQAv2/*/testdev-*")
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    _, other, _ = ask("vqav2_testdev", *more)
    assert len(other.shown) == 5, "and so are the questions of other files"
    assert ask("vqav2_testdev", *more, reply=stops)[0] == INTERRUPTED
    _, rest, _ = ask("vqav2_testdev", *more)
    assert rest.at_once == [2, 1] and "red" in "".join(prompt for prompt, *_ in rest.shown)
    assert out.read_bytes() == expected
    assert [*out.parent.iterdir()] == [out], "answers are kept until the file is there"


@pytest.mark.parametrize(
    ("benchmark", "ids", "message"),
    [
        ("vqav2", None, "--benchmark: 'vqav2' is not accepted. Accepted: one of vqav2_testdev, "),
        ("vqav2_testdev", None, "v2_OpenEnded_mscoco_test2015_questions.json"),
        ("vqav2_testdev", [7, 9], "a file with every question of vqav2_testdev"),
        ("vizwiz_test", ALL, "it is for VQAv2"),
    ],
)
def test_wrong_arguments_are_said_before_a_question_is_asked(
    ask, questions, benchmark, ids, message, capsys
):
    more = ["--questions", questions(*ids)] if ids else []
    status, oracle, out = ask(benchmark, *more)
    assert status == 2 and message in capsys.readouterr().err
    assert not oracle.shown and not out.parent.exists()


def test_a_file_that_holds_no_questions_is_named(ask, tmp_path, capsys):
    (tmp_path / "annotations.json").write_text('{"annotations": []}')
    status, *_ = ask("vqav2_testdev", "--questions", tmp_path / "annotations.json")
    assert status == 2 and "annotations.json" in capsys.readouterr().err
