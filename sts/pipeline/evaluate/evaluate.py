"""Scores of a trained model: lm-eval on its checkpoint, with controls beside every score.

blind is the same of a share of the questions, images turned grey: what the words give away;
majority is the most frequent answer of each question form, chance a guess among its answers.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval

from sts.pipeline.config import Config, config_hash
from sts.pipeline.evaluate.asking import (
    BLIND,
    forget_answers,
    kept_answers,
    load_model,
    share_questions,
)
from sts.pipeline.evaluate.loading import (
    Benchmark,
    load_benchmarks,
    metric_of,
    version_of,
    with_grey_images,
)
from sts.pipeline.evaluate.scoring import answer, summary
from sts.pipeline.files import read_json, write_json_atomic, write_text_atomic
from sts.pipeline.run import follows, provenance, tracking
from sts.pipeline.run.device import lease, precision_here
from sts.pipeline.run.weights import weights_of


def evaluate(
    config: Config,
    ablation: str,
    seed: int,
    run: str | Path,
    data: Sequence[str | Path],
    out: str | Path,
) -> dict[str, Any]:
    """Measure a trained run; write and return the result. Goes on where a call was interrupted.

    Answers go to samples/<benchmark>.jsonl beside `out`, time and place to eval/provenance.json. Of
    several processes the first writes, and the others return nothing.

    Args:
        config, ablation, seed: of the run.
        run: manifest of its last stage.
        data: manifests of the prepared data sets that the benchmarks ask.
        out: result to write.

    Raises:
        FileNotFoundError: a manifest, a split or the weights are missing.
        DataError: the data of benchmarks of the hub can't be had, or changed since they were noted.
        ConfigError: there is no such benchmark or metric.
        ValueError: this is not the number of processes that the configuration says.
    """
    options, out, trained = config.evaluate, Path(out), read_json(run)
    benchmarks, metrics = _with_metrics(config, data)  # what is missing is said before the model
    weights, precision = weights_of(run), precision_here(trained["precision"])
    tags = {"ablation": ablation, "seed": seed, "stage": "evaluate", "config": config_hash(config)}
    tags |= {"weights": trained["weights_sha256"], "precision": precision}
    # another key is another run: of other questions, or asked otherwise
    versions = _versions(config, benchmarks, data)
    parts = [tags["weights"], precision, *follows.of_evaluation(config), *versions.values()]
    folder = out.with_suffix("") / config_hash(*parts)
    noted = {"params": options.model_dump(), "tags": tags, "directory": folder}
    with lease(), tracking.run(f"{ablation}/seed{seed}/evaluate", **noted) as tracked:
        state = share_questions(options.processes)
        lm = load_model(weights, precision, config)
        facts = {"kept": len(kept_answers(folder))}
        began, cpu_began = time.monotonic(), time.process_time()
        scores, samples = answer(lm, benchmarks, metrics, options, folder)
        facts |= {"samples": sum(map(len, samples.values())), "seconds": time.monotonic() - began}
        facts["cpu_seconds"] = time.process_time() - cpu_began
        if not state.is_main_process:
            return {}
        result = {"ablation": ablation, "seed": seed, "weights_sha256": trained["weights_sha256"]}
        result |= {"lm_eval": lm_eval.__version__, "precision": precision}
        result["batch_tokens"] = options.batch_tokens
        result["benchmarks"] = {
            name: summary(name, scores, samples[name]) | {"data": version}
            for name, version in versions.items()
        }
        _write(out, result, samples, facts | provenance.collect(tags["config"]))
        forget_answers(folder)
        entries = result["benchmarks"].items()
        row = {f"{name}.{key}": value for name, entry in entries for key, value in entry.items()}
        tracked.rows = lambda: [{"step": 0} | row]
        tracked.artifact(out)
    return result


def _write(out: Path, result: dict, samples: Mapping[str, list[dict]], facts: dict) -> None:
    """Write the files of an evaluation."""
    for name, rows in samples.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_text_atomic(out.parent / "samples" / f"{name}.jsonl", lines)
    write_json_atomic(out.with_suffix("") / "provenance.json", facts)
    write_json_atomic(out, result)  # last


def _with_metrics(
    config: Config, data: Sequence[str | Path]
) -> tuple[dict[str, Benchmark], dict[str, str]]:
    """The benchmarks by name, with their blind twins, and the metric of each."""
    options = config.evaluate
    benchmarks = load_benchmarks(options, data, config.data.mirror)
    metrics = {name: metric_of(name, item, options) for name, item in benchmarks.items()}
    if options.blind:
        benchmarks |= {name + BLIND: with_grey_images(item) for name, item in benchmarks.items()}
        metrics |= {name + BLIND: metric for name, metric in metrics.items()}
    return benchmarks, metrics


def _versions(
    config: Config, benchmarks: Mapping[str, Benchmark], data: Sequence[str | Path]
) -> dict[str, str]:
    """The hash of the data of each benchmark."""
    names, mirror = config.evaluate.benchmarks, config.data.mirror
    return {name: version_of(name, benchmarks[name], data, mirror) for name in names}
