"""A trained run as a model of its own: plain files for transformers, and a model card.

    python -m sts export --ablation sts --seed 0 --to FOLDER

The card says only what result files hold. The weights of the run stay as they are.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from sts.pipeline.files import read_json
from sts.pipeline.report.results import configuration, stages_of
from sts.pipeline.run.weights import DONE, HELD_OUT, HISTORY, read_history, weights_of

OF_TRAINING = {DONE, HISTORY, HELD_OUT, "provenance.json"}  # no part of the model
CARD = """---
{{ card_data }}
---

# {{ name }}

Trained by the Sparse Training Scheme's pipeline ([arXiv 2509.18150](https://arxiv.org/abs/2509.18150)).
What was sparse in training is gone: the model is a plain `{{ architecture }}`.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER)
```

## Training

| stage | data | steps | VTC | LDS | hours | hardware |
| :-- | :-- | --: | :-- | :-- | --: | :-- |
{% for stage in stages -%}
| {{ stage | join(" | ") }} |
{% endfor %}
Hours are those of the optimizer steps on this hardware. Energy was not measured.

## Evaluation

{% if scores -%}
| benchmark | metric | score | grey image | majority answer | questions |
| :-- | :-- | --: | --: | --: | --: |
{% for score in scores -%}
| {{ score | join(" | ") }} |
{% endfor -%}
{%- else -%}
Not evaluated.
{% endif %}
## Provenance

Commit {{ commit }}; ablation `{{ ablation }}`, seed {{ seed }}; SHA-256 of the weights
`{{ sha256 }}`.
"""


def export(results: str | Path, ablation: str, seed: int, folder: str | Path) -> None:
    """Write a trained run's model, processor with chat template and card into a new folder, with
    files that everybody may read.

    Args:
        results: Folder of a scale's results.
        ablation, seed: The run, whose last stage has to be finished.
        folder: To write; must be empty or not there.

    Raises:
        FileNotFoundError: The run is not trained, or is of no configuration that is there.
        FileExistsError: The folder has files.
        SpoiltError: The weights are not as they were written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: has files already. Give a new folder")
    run = Path(results) / "runs" / ablation / f"seed{seed}"
    weights = weights_of(run / f"{stages_of(results, ablation)[-1]}.json")
    card = model_card(results, ablation, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for file in weights.iterdir():
            if file.is_file() and file.name not in OF_TRAINING:
                shutil.copyfile(file, part / file.name)
        card.save(part / "README.md")
        for file in part.iterdir():
            file.chmod(0o644)
        part.chmod(0o755)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def push(results: str | Path, ablation: str, seed: int, name: str) -> str:
    """Put what `export` writes into a repository of the hub, `owner/name`, which is made as a
    private one if it is not there. Returns its address. Raises as `export` and huggingface_hub."""
    api = HfApi()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        export(results, ablation, seed, folder)
        api.create_repo(name, private=True, exist_ok=True)
        message = f"{ablation}, seed {seed}"
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    return f"{api.endpoint}/{name}"


def model_card(results: str | Path, ablation: str, seed: int) -> ModelCard:
    """The card of a trained run, from its manifests, configuration, provenance and scores."""
    results = Path(results)
    run, config = results / "runs" / ablation / f"seed{seed}", configuration(results, ablation)
    if not config:
        raise FileNotFoundError(f"{results}/configs/{ablation}.yaml: no such file. Run snakemake")
    manifests = {name: read_json(run / f"{name}.json") for name in config["stages"]}
    last = list(manifests.values())[-1]
    scored = (run / "eval.json").exists()
    benchmarks = read_json(run / "eval.json")["benchmarks"] if scored else {}
    name = f"{config['scale']}-{ablation}-seed{seed}"
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["sparse-training-scheme"],
        base_model=_hub_names(config["model"]) or None,
        eval_results=[_result(*item) for item in benchmarks.items()] or None,
    )
    return ModelCard.from_template(
        data,
        template_str=CARD,
        name=name,
        architecture=read_json(Path(last["weights"]) / "config.json")["architectures"][0],
        stages=[_stage(manifests[name], block) for name, block in config["stages"].items()],
        scores=[_score(*item) for item in benchmarks.items()],
        commit=read_json(Path(last["weights"]) / "provenance.json")["git"]["commit"] or "unknown",
        ablation=ablation,
        seed=seed,
        sha256=last["weights_sha256"],
    )


def _hub_names(model: dict[str, Any]) -> list[str]:
    """Models of the hub that the training began with, without their commits."""
    names = [str(model[key]) for key in ("checkpoint", "vision", "language") if model.get(key)]
    names = [name.partition("@")[0] for name in names if not Path(name).exists()]
    return [name for name in names if re.fullmatch(r"[\w.-]+/[\w.-]+", name)]


def _stage(manifest: dict[str, Any], block: dict[str, Any]) -> list[str]:
    weights, vtc, lds = Path(manifest["weights"]), block["vtc"], block["lds"]
    seconds = sum(row["seconds"] for row in read_history(weights))
    hardware = read_json(weights / "provenance.json")["hardware"]
    gpus = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"
    return [
        manifest["stage"],
        ", ".join(block["data"]),
        str(manifest["steps"]),
        f"{vtc['kind']}, keep {vtc['keep']:g}" if vtc["keep"] < 1 else "none",
        f"{lds['policy']}, rate {lds['rate']:g}" if lds["rate"] else "none",
        f"{seconds / 3600:.3f}",
        f"{gpus}, {manifest['precision']}",
    ]


def _score(benchmark: str, entry: dict[str, Any]) -> list[str]:
    values = (entry[key] for key in ("score", "blind", "majority"))
    numbers = ["n/a" if value is None else f"{value:.3f}" for value in values]
    return [benchmark, entry["metric"], *numbers, str(entry["n"])]


def _result(benchmark: str, entry: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="visual-question-answering",
        dataset_type=benchmark,
        dataset_name=benchmark,
        metric_type=entry["metric"],
        metric_value=entry["score"],
    )
