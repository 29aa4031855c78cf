"""The hub's benchmarks: questions as LLaVA asks them, scores as their authors reckon them."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import datasets
import pytest
from asking import Oracle, picture
from configs import RECIPE
from hub_server import COMMIT, hub
from hub_sets import ART, OFFICIAL, write_mmmu, write_sets

from sts.pipeline.config import EvaluateConfig, validate
from sts.pipeline.data.benchmark_sets import files_of
from sts.pipeline.data.origins import state
from sts.pipeline.data.source import DataError
from sts.pipeline.evaluate import asking
from sts.pipeline.evaluate.loading import fetch, load_benchmarks, metric_of, tasks_of, version_of
from sts.pipeline.evaluate.scoring import answer
from sts.pipeline.files import read_json
from sts.pipeline.tasks import official
from sts.pipeline.tasks import registry as benchmarks
from sts.pipeline.tasks.parquet import split_files

ROOT = Path(__file__).resolve().parents[2]

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


def configuration(mirror, *names):
    stages = {"instruct": RECIPE | {"trains": ["projector"]}}
    scale = {"stages": stages, "data": {"mirror": str(mirror)},
             "evaluate": {"benchmarks": list(names)}}  # fmt: skip
    return validate(scale, "test.yaml")


def load(mirror, *names):
    options = configuration(mirror, *names).evaluate
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


# ---- which questions ----------------------------------------------------------------------------


def rewritten(root: Path, path: str, change) -> None:
    """Write a set of the mirror again with other rows."""
    parts = {
        name: {split: (columns, change(rows)) for split, (columns, rows) in splits.items()}
        for name, splits in OFFICIAL[path].items()
    }
    shutil.rmtree(root / path)
    write_sets(root, {path: parts})


def test_a_limit_takes_what_is_scored_together_or_leaves_it(tmp_path, monkeypatch):
    """Of MMBench all copies of a question, of MME both questions of a picture: a model that is
    right once in two has neither 0 nor 1 of them by chance of the draw."""
    monkeypatch.delenv("STS_DATA_MIRROR", raising=False)
    root = write_sets(tmp_path, OFFICIAL)
    rewritten(root, "lmms-lab/MMBench", lambda rows: [
        rows[0] | {"index": 1_000_000 * turn + question, "answer": "AB"[turn % 2]}
        for turn in range(4) for question in range(6 - turn)
    ])  # fmt: skip
    rewritten(root, "lmms-lab/MME", lambda rows: [
        rows[0] | {"question_id": f"count/{picture}", "answer": answer}
        for answer in ("Yes", "No") for picture in range(10)
    ])  # fmt: skip
    loaded, _ = load(root, "mmbench_en", "mme_perception")
    for name, bundle in (("mmbench_en", lambda row: row["index"] % 1_000_000),
                         ("mme_perception", lambda row: row["question_id"])):  # fmt: skip
        docs = loaded[name].eval_docs
        sizes = Counter(map(bundle, docs))
        before: set[int] = set()
        for limit in range(1, len(docs) + 1):
            drawn = {
                place for _, place in asking.draw_places({(name, name): loaded[name]}, limit, 1)
            }
            for key, count in Counter(bundle(docs[place]) for place in drawn).items():
                assert count == sizes[key], (name, limit, key)
            assert before <= drawn and len(drawn) <= max(limit, max(sizes.values()))
            assert len(drawn) > limit - max(sizes.values()), "as many as there is room for"
            before = drawn
        assert len(before) == len(docs)


def test_what_is_asked_is_what_the_folder_holds_now(tmp_path, monkeypatch):
    """Of our task files and of lm-eval's own, which `datasets` reads and keeps by name."""
    monkeypatch.delenv("STS_DATA_MIRROR", raising=False)
    monkeypatch.chdir(tmp_path)  # folders may be named from where we stand
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("home"))
    names = ("pope", "mmmu_val_art_and_design")
    root = write_sets(Path("mirror"), OFFICIAL)
    counts, versions = [], []
    for times in (1, 5):
        rewritten(root, "lmms-lab-encoder/POPE", lambda rows, times=times: rows * times)
        shutil.rmtree(root / "MMMU", ignore_errors=True)
        write_mmmu(root, ART, times)
        loaded, _ = load(root, *names)
        counts.append([sum(len(task.eval_docs) for task in tasks_of(loaded[n])) for n in names])
        versions.append([version_of(n, loaded[n], [], str(root)) for n in names])
    assert counts == [[6, 12], [30, 60]]
    assert all(first != second for first, second in zip(*versions, strict=True))
    assert version_of(names[1], loaded[names[1]], [], None), "of the cache's files"
    assert {file.name for file in tmp_path.iterdir()} == {"home", "mirror"}
    assert not (root / "home").exists()


def test_a_benchmark_whose_files_changed_is_noted_anew_or_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("STS_DATA_MIRROR", raising=False)
    root = write_sets(tmp_path / "mirror", OFFICIAL)
    config, manifest = configuration(root, "pope"), tmp_path / "pope/manifest.json"
    fetch(config, "pope", manifest)
    before, word = read_json(manifest), state(manifest)
    load_benchmarks(config.evaluate, [manifest], None)  # where it was noted
    assert state(manifest) == word
    assert before["sha256"] == version_of("pope", load(root, "pope")[0]["pope"], [], str(root))
    fetch(config, "pope", manifest)
    assert read_json(manifest) == before, "the same data give the same manifest"
    rewritten(root, "lmms-lab-encoder/POPE", lambda rows: rows[::-1])
    assert state(manifest) != word, "which the rule follows"
    with pytest.raises(DataError, match=r"benchmark pope: .*test-0.parquet is not as it was"):
        load_benchmarks(config.evaluate, [manifest], None)
    fetch(config, "pope", manifest)
    assert read_json(manifest)["sha256"] != before["sha256"]


FETCH = """
import sys
from pathlib import Path
from sts.pipeline.data import source
from sts.pipeline.data.benchmark_sets import files_of, folder_of
for name in sys.argv[1:]:
    folder = folder_of(name, None)
    print(name, *(file.relative_to(folder) for file in files_of(name, folder)))
"""


def test_the_split_alone_is_fetched_once_and_needs_no_hub_afterwards(tmp_path, monkeypatch):
    monkeypatch.delenv("STS_DATA_MIRROR", raising=False)
    served_sets = {path.replace("lmms-lab/", "lmms-lab-encoder/"): parts
                   for path, parts in OFFICIAL.items()}  # fmt: skip
    columns, rows = OFFICIAL["lmms-lab/VQAv2"]["default"]["validation"]
    served_sets["lmms-lab-encoder/VQAv2"] = {
        "default": {"train": (columns, rows * 9), "validation": (columns, rows)}
    }
    write_sets(tmp_path / "served/hub", served_sets)
    names = ["vqav2", "gqa", "mmbench_en", "seed_image"]

    def fetched(url: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"),
                       "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
        return subprocess.run([sys.executable, "-c", FETCH, *names], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)  # fmt: skip

    with hub(tmp_path / "served") as served:
        first = fetched(served.url)
        assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines() == [
        "vqav2 default/validation-0.parquet",
        "gqa testdev_balanced_instructions/testdev-0.parquet "
        "testdev_balanced_images/testdev-0.parquet",
        "mmbench_en en/dev-0.parquet",
        "seed_image default/test-0.parquet",
    ]
    folder = tmp_path / "data/raw/hub/lmms-lab-encoder"
    files = {file.relative_to(folder).parts[0] for file in folder.rglob("*.parquet")}
    assert files == {"VQAv2", "GQA", "MMBench", "SEED-Bench"}
    assert not list(folder.rglob("train-*")) and not list(folder.rglob("cn"))
    notes = {file.parent.name: read_json(file)["commit"] for file in folder.rglob("fetched.json")}
    assert notes.pop("main") == COMMIT, "of a branch the commit of the first call"
    assert all(name == commit for name, commit in notes.items()), "pinned by the task file"
    assert fetched("http://127.0.0.1:9").stdout == first.stdout


CARDS = [
    None, "# Questions\n---\nsome: [text\n---\n", "---\nlicence: mit\n---\n",
    "---\nconfigs:\n---\n",
    *(f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n"
      for files in ("data/test-*", "{test: data/test-*}", "[data/test-*]",
                    "[{split: test, path: [data/test-*]}]", "[{split: train, path: x}]")),
]  # fmt: skip


@pytest.mark.parametrize("card", CARDS)
def test_a_split_is_its_files_whatever_the_card_says_of_them(tmp_path, card):
    """And not the notes that the hub's client leaves beside them."""
    names = ["data/test-00000-of-00002.parquet", "data/test-00001-of-00002.parquet"]
    for name in [*names, *(f".cache/huggingface/download/{name}.lock" for name in names)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    if card:
        (tmp_path / "README.md").write_text(card)
    assert split_files(tmp_path, None, "test") == [tmp_path / name for name in names]
    (tmp_path / names[0]).unlink()
    with pytest.raises(FileNotFoundError, match=r"not all files data/test-\*-of-00002.parquet of"):
        split_files(tmp_path, None, "test")


def test_a_card_that_is_broken_is_named(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nconfigs: [\n---\n")
    with pytest.raises(DataError, match=rf"benchmark pope: {card}: its YAML can't be read: while"):
        files_of("pope", tmp_path)


def test_a_benchmark_without_a_question_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("STS_DATA_MIRROR", raising=False)
    columns, rows = OFFICIAL["lmms-lab/SEED-Bench"]["default"]["test"]
    videos = {"lmms-lab/SEED-Bench": {"default": {"test": (columns, rows[1:])}}}
    write_sets(tmp_path, videos)
    with pytest.raises(ValueError, match=r"no question in .*SEED-Bench/default/test-0.parquet"):
        load_benchmarks(EvaluateConfig(benchmarks=["seed_image"]), [], str(tmp_path))


def test_an_evaluation_follows_what_reads_its_questions():
    names = {file.name for file in benchmarks.sources(["mmbench_cn"])}
    ours = {"mmbench_cn.yaml", "mmbench_en.yaml", "_official.yaml"}
    assert names == ours | {"official.py", "parquet.py"}


def test_bytes_of_benchmarks_are_counted_once_a_file():
    one, both = benchmarks.bytes_of("textvqa"), benchmarks.bytes_of("textvqa", "textvqa_ocr")
    assert one == both == 920_000_000
    assert benchmarks.bytes_of("mmbench_en", "mmbench_cn") == 2 * benchmarks.bytes_of("mmbench_en")
    assert all(benchmarks.bytes_of(name) for name in (*ASKED, "mmmu_val"))
    assert benchmarks.bytes_of("colour", "chart") == 0
