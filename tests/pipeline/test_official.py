"""The hub's benchmarks: questions as LLaVA asks them, scores as their authors reckon them."""

from itertools import chain

import pytest
from asking import Oracle, picture
from configs import RECIPE
from hub_sets import OFFICIAL, write_sets

from sts.pipeline.config import EvaluateConfig, validate
from sts.pipeline.evaluate import asking
from sts.pipeline.evaluate.loading import load_benchmarks, metric_of, tasks_of
from sts.pipeline.evaluate.scoring import answer
from sts.pipeline.tasks import official
from sts.pipeline.tasks import registry as benchmarks

# ---- rules, by hand -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("Yes.", "yes"),
        ("The two dogs", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("It couldntve been", "it couldntve been"),
        ("couldn'tve", "couldn't've"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("U.S.A.", "usa"),
        ("black-white", "black white"),
        ("black - white", "black white"),
        ("Tom's", "tom 's"),
        ("  a   cat\nand\tan owl ", "cat and owl"),
    ],
)
def test_an_answer_is_compared_as_the_servers_of_vqa_do(output, expected):
    assert official.normalise(output) == expected


def test_an_answer_is_worth_as_many_as_say_so():
    """Of ten people each is left out once: of 3 who say it, 7 of 10 times 3 are left, else 2."""
    people = ["red"] * 3 + ["blue"] * 2 + ["green"] * 1 + ["pink"] * 4
    assert official.agreement("red", people) == pytest.approx((7 * 1 + 3 * 2 / 3) / 10)
    assert official.agreement("blue", people) == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert official.agreement("green", people) == pytest.approx((9 * 1 / 3 + 0) / 10)
    assert official.agreement("pink", people) == 1
    assert official.agreement("grey", people) == 0


def test_vqa_compares_as_it_is_where_all_agree():
    agreed = {"answers": [{"answer": "2 dogs"}] * 10}
    assert official.score_vqav2(agreed, ["Two dogs."]) == {"accuracy": 1.0}
    unlike = {"answers": [{"answer": "the dog"}] * 10}
    assert official.score_vqav2(unlike, ["the dog"])["accuracy"] == 0, "as the official code"
    mixed = {"answers": [{"answer": "the dog"}] * 9 + [{"answer": "cat"}]}
    assert official.score_vqav2(mixed, ["the dog"]) == {"accuracy": 1.0}


def test_text_of_people_is_made_alike_on_both_sides():
    row = {"answers": ["Coca Cola", "coca-cola", "coca cola!", *["pepsi"] * 7]}
    score = official.score_textvqa(row, ["COCA COLA"])["accuracy"]
    assert score == pytest.approx((7 + 3 * 2 / 3) / 10)


CHOICES = {"A": "a dog", "B": "two cats", "C": "nan", "D": "three"}
# rule, row -> what the official scorer makes of an answer, worked out by hand from its text
VERDICTS = [
    (official.score_pope, {"category": "random", "answer": "no"},
     {"No": 1, "no, there is none": 1, "It is not.": 1, "NO": 0, "Yes. No": 0, "No\nIt is": 0,
      " No.": 1, "Nope": 0, "": 0}),
    (official.score_gqa, {"answer": "t-shirt"},
     {"t-shirt": 1, "T-shirt..": 1, " T-Shirt. ": 1, "tshirt": 0, "t-shirt!": 0, "a t-shirt": 0}),
    (official.score_scienceqa, {"answer": 1},
     {"B": 1, " B ": 1, "B. a dog": 1, "B.": 0, "B.a dog": 0, "b": 0, "A": 0, "(B)": 0,
      "The answer is B.": 1, "So: The answer is B, I think": 1, "The answer is B": 0,
      "The answer is B. The answer is A.": 0, "Because": 0}),
    (official.score_letter, {"answer": "C"}, {"C": 1, " C\n": 1, "C.": 0, "C. red": 0, "Cat": 0}),
    (official.score_mme, {"category": "count", "question_id": "a", "answer": "No"},
     {"No": 1, "no, it is": 1, "NO.": 1, "not so": 1, "n": 0, "Yes": 0, "It is no": 0, "oh no": 0,
      "a no": 1, "yes/no": 0}),
    (official.score_chartqa, {"answer": "14"},
     {"14": 1, "14.7": 1, "14.71": 0, "13.3": 1, "14%": 0, "1400%": 1, "$14": 0, "fourteen": 0}),
    (official.score_chartqa, {"answer": "0"}, {"0": 1, "0.0": 0, "0.01": 0}),
    (official.score_chartqa, {"answer": "Peru"},
     {"peru": 1, " Peru ": 1, "Peru.": 0, "in Peru": 0}),
    (official.score_mmbench, {"index": 7, "answer": "B"} | CHOICES,
     {"B": 1, "B.": 1, "(B)": 1, "**B**": 1, "B: two cats": 1, "It shows Two cats": 1, "A or B": 0,
      "b": 0, "D": 0, "two cats and a dog": 0, "": 0}),
]  # fmt: skip
CASES = [
    (rule, row, output, right)
    for rule, row, verdicts in VERDICTS
    for output, right in verdicts.items()
]


@pytest.mark.parametrize(("rule", "row", "output", "right"), CASES)
def test_an_answer_is_right_where_the_official_scorer_says_so(rule, row, output, right):
    scores = rule(row, [output])
    assert scores.get("accuracy", scores.get("relaxed_accuracy")) == right


def test_options_of_mmbench_end_at_the_first_that_is_none():
    assert official.options_of(CHOICES) == {"A": "a dog", "B": "two cats"}
    assert official.options_of(CHOICES | {"C": "x", "E": "y"}) == CHOICES | {"C": "x"}


def test_pope_is_the_mean_of_the_f1_of_each_way_of_choosing():
    def verdicts(category, *pairs):
        return [
            {"category": category, "output": output, "answer": answer} for output, answer in pairs
        ]

    random = verdicts("random", ("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"))
    popular = verdicts("popular", ("yes", "yes"), ("no", "no"), ("yes", "no"))
    silent = verdicts("adversarial", ("no", "no"))
    assert official.mean_f1(random) == 0.5
    assert official.mean_f1(popular) == pytest.approx(2 * 1 / 3)
    assert official.mean_f1(random + popular + silent) == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)


def test_mme_adds_the_share_of_answers_and_of_whole_pairs():
    def verdicts(category, image, *corrects):
        return [{"category": category, "image": image, "correct": correct} for correct in corrects]

    count = verdicts("count", "a", True, True) + verdicts("count", "b", True, False)
    scene = verdicts("scene", "a", False, False)
    assert official.mme_total(count) == pytest.approx(100 * (3 / 4 + 1 / 2))
    assert official.mme_total(count + scene) == official.mme_total(count)
    landmark = verdicts("landmark", "c", True, True)
    assert official.mme_total(count + landmark) == pytest.approx(125 + 200)


def test_mmbench_counts_a_question_if_every_turn_of_it_is_right():
    rows = [
        {"index": 7, "answer": "A"} | CHOICES,
        {"index": 1_000_007, "answer": "B"} | CHOICES,
        {"index": 8, "answer": "B"} | CHOICES,
    ]
    verdicts = [official.score_mmbench(row, [output])["circular"] for row, output in zip(
        rows, ["A", "A.", "(B)"], strict=True)]  # fmt: skip
    assert [verdict["correct"] for verdict in verdicts] == [True, False, True]
    assert official.all_copies(verdicts) == 0.5


# ---- through lm-eval, on files of the form of the hub's ----------------------------------------


HIGHEST = {"mme_perception": 400.0, "mme_cognition": 200.0}  # two categories, and one
ASKED = {
    "pope": 6, "gqa": 3, "scienceqa_img": 2, "textvqa": 1, "textvqa_ocr": 1, "vizwiz": 1,
    "vqav2": 1, "mme_perception": 4, "mme_cognition": 2, "seed_image": 1, "mmbench_en": 2,
    "mmbench_cn": 2, "chartqa": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("mirror"), OFFICIAL)


def settings(mirror, *names):
    stages = {"instruct": RECIPE | {"trains": ["projector"]}}
    scale = {"stages": stages, "data": {"mirror": str(mirror)},
             "evaluate": {"benchmarks": list(names)}}  # fmt: skip
    return validate(scale, "test.yaml").evaluate


def load(mirror, *names):
    options = settings(mirror, *names)
    loaded = load_benchmarks(options, [], str(mirror))
    return loaded, {name: metric_of(name, item, options) for name, item in loaded.items()}


def says(prompt, *_):
    """What a question asks for: the word after `say`."""
    words = prompt.replace("?", "").split()
    asks = [word.lower() for word in words]
    return words[asks.index("say") + 1] if "say" in asks else words[4]


def scored(oracle, loaded, metrics, folder, **options):
    """`answer`, which keeps nothing that another call would find."""
    folder = folder / str(len(list(folder.iterdir())))
    return answer(oracle, loaded, metrics, EvaluateConfig(**options), folder)


def test_every_benchmark_of_the_hub_is_asked_and_scored(mirror, tmp_path, monkeypatch):
    monkeypatch.delenv("STS_DATA_MIRROR", raising=False)
    assert set(ASKED) == {name for name in benchmarks.ours() if not benchmarks.dataset_of(name)}
    loaded, metrics = load(mirror, *ASKED)
    oracle = Oracle(says)
    scores, samples = scored(oracle, loaded, metrics, tmp_path)
    assert {name: len(rows) for name, rows in samples.items()} == ASKED
    for name, score in scores.items():
        assert score["score"] == HIGHEST.get(name, 1.0), name
        assert score["share"] == (name not in HIGHEST)
        assert all(row["correct"] is True for row in samples[name]), name
    for prompt, options, images in oracle.shown:
        assert prompt.count("<image>") == len(images) and all(image.std() > 0 for image in images)
        assert options["max_gen_toks"] == 128 and not options["until"]
    wrong, _ = scored(Oracle(lambda *_: "what of it"), loaded, metrics, tmp_path)
    assert {name for name, entry in wrong.items() if entry["score"]} == {"pope"}, "that is a yes"


def test_a_question_that_is_not_asked_is_wrong_by_every_rule(mirror, tmp_path, monkeypatch):
    monkeypatch.delenv("STS_DATA_MIRROR", raising=False)
    loaded, metrics = load(mirror, *ASKED)
    oracle = Oracle(says)
    oracle.max_length = 0
    scores, samples = scored(oracle, loaded, metrics, tmp_path)
    assert not oracle.shown and {entry["score"] for entry in scores.values()} == {0}
    for row in chain(*samples.values()):
        assert row["correct"] is False and row["output"] == "" and "not asked" in row["note"]


def test_scores_are_the_same_in_pieces_and_no_other_picture_is_decoded(
    mirror, tmp_path, monkeypatch
):
    """Of MME and MMBench a score needs answers from several pieces at once."""
    monkeypatch.delenv("STS_DATA_MIRROR", raising=False)
    some = ["pope", "mme_perception", "mmbench_en", "gqa"]
    loaded, metrics = load(mirror, *some)
    at_once = scored(Oracle(says), loaded, metrics, tmp_path, limit=4)
    monkeypatch.setattr(asking, "AT_ONCE", 3)
    oracle = Oracle(says)
    assert scored(oracle, loaded, metrics, tmp_path, limit=4) == at_once
    assert oracle.at_once == [3, 3, 3, 3, 1]  # of 4 + 4 + 2 + 3

    [task] = tasks_of(loaded["pope"])
    docs, taken = task.eval_docs, []

    class Counted:
        def __len__(self):
            return len(docs)

        def __getitem__(self, place):
            taken.append(place)
            return docs[place]

    monkeypatch.setattr(type(task), "eval_docs", Counted())
    id = ("pope", "sts_pope")
    asked = asking.ask(Oracle(says), {id: task}, [(id, 1), (id, 4)], 100, tmp_path / "two")
    samples = [sample for *_, sample in asked]
    assert [sample["doc_id"] for sample in samples] == [1, 4]
    assert set(taken) == {1, 4}


def test_questions_are_llavas(mirror, monkeypatch):
    monkeypatch.delenv("STS_DATA_MIRROR", raising=False)
    loaded, _ = load(mirror, *ASKED)
    first = {name: item.doc_to_text(next(iter(item.eval_docs))) for name, item in loaded.items()}
    word, letter = f"\n{official.WORD}", f"\n{official.LETTER}"
    assert first == {
        "pope": "<image>\nIs there a yes?" + word,
        "gqa": "<image>\nsay red" + word,
        "scienceqa_img": "<image>\nContext: Look.\nsay B\nA. x\nB. y" + letter,
        "textvqa": "<image>\nSay stop" + word,
        "textvqa_ocr": "<image>\nSay stop\nReference OCR token: STOP, ALL" + word,
        "vizwiz": f"<image>\nSay unanswerable\n{official.UNKNOWN}" + word,
        "vqav2": "<image>\nsay two" + word,
        "mme_perception": "<image>\nsay Yes" + word,
        "mme_cognition": "<image>\nsay Yes" + word,
        "chartqa": "<image>\nsay 14" + word,
        "seed_image": "<image>\nsay C\nA. choice_a 0\nB. choice_b 0\nC. choice_c 0\nD. choice_d 0"
        + letter,
        "mmbench_en": "<image>\nsay A\nA. x\nB. y\nC. C 0\nD. D 0" + letter,
        "mmbench_cn": "<image>\nsay A\nA. x\nB. y\nC. C 0\nD. D 0\n请直接回答选项字母。",
    }


def test_gqa_finds_the_picture_that_a_question_names(mirror, monkeypatch):
    monkeypatch.delenv("STS_DATA_MIRROR", raising=False)
    loaded, _ = load(mirror, "gqa")
    [task] = tasks_of(loaded["gqa"])
    images = [task.doc_to_image(row)[0] for row in task.eval_docs]
    assert [list(image.getdata()) for image in images] == [
        list(picture(place).getdata()) for place in (1, 0, 1)
    ]  # n0 is the second of the pictures
