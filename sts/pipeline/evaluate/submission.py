"""Files for benchmarks whose answers are not public: their servers give the score.

A model is asked as it is for a score, by the same task, on another split. OUT.answers keeps what it
says until the file is there, so that a call that was interrupted goes on.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sts.pipeline.config import Config, ConfigError, config_hash
from sts.pipeline.data.origins import stamp
from sts.pipeline.evaluate.asking import ask, load_model
from sts.pipeline.evaluate.loading import load_benchmarks, tasks_of
from sts.pipeline.files import read_json, write_text_atomic
from sts.pipeline.run.device import lease, precision_here
from sts.pipeline.run.weights import weights_of
from sts.pipeline.tasks.official import is_filled, normalise

Rows = Sequence[Mapping[str, Any]]
ALL_IDS = (
    "v2_OpenEnded_mscoco_test2015_questions.json, of visualqa.org's v2_Questions_Test_mscoco.zip"
)


def vqa(rows: Rows, outputs: Sequence[str], all_ids: Sequence[int]) -> str:
    """VQAv2: a JSON list of {question_id, answer} (visualqa.org/evaluation.html).

    Its server, EvalAI's challenge 830, refuses a file without every question of test2015, also
    where it scores test-dev alone (its message: X-PLUG/mPLUG-DocOwl issue 55). So those of
    `all_ids` that were not asked get an empty answer, as in LLaVA's
    convert_vqav2_for_submission.py.
    """
    pairs = zip(rows, outputs, strict=True)
    answers = {int(row["question_id"]): normalise(output) for row, output in pairs}
    ids = all_ids or answers
    return json.dumps([{"question_id": id, "answer": answers.get(id, "")} for id in ids])


def vizwiz(rows: Rows, outputs: Sequence[str], _: Sequence[int]) -> str:
    """VizWiz: a JSON list of {image, answer}, image the name of its file (LLaVA's
    convert_vizwiz_for_submission.py). The hub's copy names a question by that without `.jpg`."""
    names = [f"{row['question_id'].removesuffix('.jpg')}.jpg" for row in rows]
    pairs = zip(names, map(normalise, outputs), strict=True)
    return json.dumps([{"image": name, "answer": answer} for name, answer in pairs])


def mmbench(rows: Rows, outputs: Sequence[str], _: Sequence[int]) -> str:
    """MMBench: a table of the questions with a column `prediction`, the model's words as they are
    (LLaVA's convert_mmbench_for_submission.py), with tabs, as VLMEvalKit reads it. Its own server
    is closed and its answers are in VLMEvalKit since (open-compass/VLMEvalKit issue 1516)."""
    kinds = ["category", "L2-category", "source", "split"]
    columns = ["index", "question", "hint", *"ABCDE", "answer", *kinds]
    table = pd.DataFrame(
        {name: row[name] if is_filled(row[name]) else "" for name in columns if name in row}
        for row in rows
    )
    table["prediction"] = outputs
    return table.to_csv(sep="\t", index=False)


FORMS = {"vqav2": vqa, "vizwiz": vizwiz, "mmbench_en": mmbench, "mmbench_cn": mmbench}
# <benchmark whose task asks>_<split of its data set that has no answers here>
SERVERS = (
    *("vqav2_testdev", "vqav2_test", "vizwiz_test"),
    *("mmbench_en_dev", "mmbench_en_test", "mmbench_cn_dev", "mmbench_cn_test"),
)


def submission(
    config: Config, name: str, run: str | Path, out: str | Path, questions: str | Path | None = None
) -> None:
    """Ask a trained run every question of a server, and write the file that it takes. All that can
    be known is checked before the model is loaded.

    Args:
        config: of the run.
        name: one of SERVERS.
        run: manifest of its last stage.
        out: file to write.
        questions: VQAv2's file of all questions of test2015, which vqav2_testdev needs.

    Raises:
        ConfigError: the name is unknown, or questions are missing or others than those asked.
        FileNotFoundError, DataError: as an evaluation.
    """
    all_ids = _all_ids(name, questions)
    benchmark, split = name.rsplit("_", 1)
    trained, out = read_json(run), Path(out)
    options = config.evaluate.model_copy(update={"benchmarks": [benchmark]})
    [task] = tasks_of(load_benchmarks(options, [], config.data.mirror, split)[benchmark])
    task.process_results = lambda doc, results: {}  # nobody knows the answers
    task.doc_to_target = lambda doc: ""
    docs = task.eval_docs.remove_columns("image")
    if all_ids and {int(id) for id in docs["question_id"]} - set(all_ids):
        raise _refused("--questions", str(questions), f"a file with every question of {name}")
    precision = precision_here(trained["precision"])
    stamps = [[str(file), *stamp(file)] for file in docs.files]
    parts = [trained["weights_sha256"], precision, task.VERSION, options.batch_tokens, stamps]
    folder = Path(f"{out}.answers", config_hash(parts))
    with lease():
        lm = load_model(weights_of(run), precision, config)
        id = (name, name)
        places = [(id, place) for place in range(len(docs))]
        answers = ask(lm, {id: task}, places, options.batch_tokens, folder)
        outputs = [sample["filtered_resps"][0] for *_, sample in answers]
    write_text_atomic(out, FORMS[benchmark](list(docs), outputs, all_ids))
    shutil.rmtree(folder.parent)


def _all_ids(name: str, questions: str | Path | None) -> list[int]:
    """All question ids that a server wants; ConfigError where its name or the file don't fit."""
    if name not in SERVERS:
        raise _refused("--benchmark", name, f"one of {', '.join(SERVERS)}")
    if name == "vqav2_testdev" and not questions:
        accepted = f"{ALL_IDS}: the server wants a prediction for each, if an empty one"
        raise _refused("--questions", None, accepted)
    if not questions:
        return []
    if not name.startswith("vqav2"):
        raise _refused("--questions", str(questions), "none: it is for VQAv2")
    try:
        content = json.loads(Path(questions).read_text(encoding="utf-8"))
        return [int(question["question_id"]) for question in content["questions"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _refused("--questions", str(questions), f"{ALL_IDS} ({error})") from None


def _refused(key: str, value: Any, accepted: str) -> ConfigError:
    return ConfigError("command line", key, value, accepted)
