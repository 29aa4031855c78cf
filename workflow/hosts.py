"""The library where others train, in one command: `make hosts`, or

    python -m workflow.hosts [NAME ...]

Each name of HOSTS is an environment of its own, .hosts/NAME: this one's packages, and over them a
host's release with what it asks for. With a release of transformers the library's everyday tests
run; in a training program a tiny shipped model is trained sparsely by the host's own command. The
table says what passed, with the versions. Status 0: nothing failed. A host that can't be installed
is said to be not run, which is no failure: some need what only a GPU's machine has.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".hosts"
LIMIT = 1200  # seconds of a host: one that hangs must not keep the others waiting
QWEN, NEXT = (ROOT / "data/backbones" / name for name in ("qwen2_5_vl", "llava_next"))
STS = {"vtc": {"kind": "uniform", "keep": 0.5}, "lds": {"policy": "layerdrop", "rate": 0.5}}
COLOURS = ("red", "green", "blue", "white")
STEPS = 4
TESTS = ("scheme", "library", "wrappers")
# torchvision's import asks for these two, whether they were loaded or not
DECLARED = """
_declared = torch.library.Library("torchvision", "FRAGMENT")
for _name in () if _has_ops() else ("nms", "qnms"):
    _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
# What every Trainer of transformers is told
USUAL = {
    "max_steps": STEPS, "learning_rate": 1e-3, "logging_steps": 1, "gradient_accumulation_steps": 2,
    "save_strategy": "steps", "save_steps": STEPS, "bf16": False,
}  # fmt: skip


class Host(NamedTuple):
    """A release to install, what else it needs, and the command that runs it in a folder."""

    release: str
    more: Sequence[str]
    command: Callable[[Path, Path], list[str]]  # (bin of the environment, folder)


def tests(bin: Path, folder: Path) -> list[str]:
    """The library's everyday tests, but those of model types that an older release hasn't."""
    command = [str(bin / "python"), "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    files = [str(ROOT / f"tests/library/test_{name}.py") for name in TESTS]
    return [*command, "-m", "not slow and not gpu", *files]


def write_samples(folder: Path) -> list[dict]:
    """Pictures of one colour, each asked for, in the form that most programs take."""
    rows = []
    for colour in COLOURS:
        picture = folder / f"{colour}.png"
        Image.new("RGB", (84, 84), colour).save(picture)
        messages = [
            {"role": "user", "content": "<image>what color is it?"},
            {"role": "assistant", "content": colour},
        ]
        rows.append({"messages": messages, "images": [str(picture)]})
    rows *= 8
    (folder / "samples.json").write_text(json.dumps(rows))
    return rows


def lightning(bin: Path, folder: Path) -> list[str]:
    return [str(bin / "python"), "-m", "examples.lightning_module", str(NEXT), str(folder / "out")]


def llama_factory(bin: Path, folder: Path) -> list[str]:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
    data = {
        "file_name": "samples.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": tags | {"assistant_tag": "assistant"},
    }
    (folder / "dataset_info.json").write_text(json.dumps({"colours": data}))
    values = USUAL | {
        "model_name_or_path": str(NEXT), "template": "llava_next", "stage": "sft",
        "do_train": True, "finetuning_type": "full", "dataset": "colours",
        "dataset_dir": str(folder), "output_dir": str(folder / "out"), "report_to": "none",
        "per_device_train_batch_size": 2, "cutoff_len": 1024, "sts": STS, "use_cpu": True,
    }  # fmt: skip
    (folder / "train.yaml").write_text(yaml.safe_dump(values))
    return [str(bin / "python"), "-m", "sts.hosts.llama_factory", str(folder / "train.yaml")]


def ms_swift(bin: Path, folder: Path) -> list[str]:
    token = json.loads((QWEN / "config.json").read_text())["image_token_id"]
    (folder / "sparse.py").write_text(
        "from sts import LDS, VTC\n"
        "from sts.hosts.ms_swift import register\n"
        "from swift.template.templates.qwen import Qwen2VLTemplate\n"
        f"register('sts', VTC(**{STS['vtc']}), LDS(**{STS['lds']}))\n"
        f"Qwen2VLTemplate.image_token_id = {token}  # not of the large models\n"
    )
    values = USUAL | {
        "model": QWEN, "model_type": "qwen2_5_vl", "template": "qwen2_5_vl",
        "dataset": folder / "samples.json", "torch_dtype": "float32", "tuner_type": "full",
        "per_device_train_batch_size": 2, "output_dir": folder / "out", "report_to": "none",
        "external_plugins": folder / "sparse.py", "callbacks": "sts", "add_version": False,
        "use_cpu": True, "split_dataset_ratio": 0, "use_hf": True, "dataset_num_proc": 1,
    }  # fmt: skip
    options = [text for key, value in values.items() for text in (f"--{key}", str(value))]
    return [str(bin / "swift"), "sft", *options]


def axolotl(bin: Path, folder: Path) -> list[str]:
    with open(folder / "samples.jsonl", "w") as file:
        for row in json.loads((folder / "samples.json").read_text()):
            question, answer = row["messages"]
            text = question["content"].removeprefix("<image>")
            parts = [{"type": "image", "path": row["images"][0]}, {"type": "text", "text": text}]
            turns = [question | {"content": parts}]
            turns += [answer | {"content": [{"type": "text", "text": answer["content"]}]}]
            file.write(json.dumps({"messages": turns}) + "\n")
    values = USUAL | {
        "base_model": str(NEXT), "processor_type": "AutoProcessor", "micro_batch_size": 2,
        "plugins": ["sts.hosts.axolotl.SparsePlugin"], "sts": STS,
        "datasets": [{"path": str(folder / "samples.jsonl"), "type": "chat_template"}],
        "chat_template": "tokenizer_default", "skip_prepare_dataset": True,
        "remove_unused_columns": False, "sample_packing": False, "sequence_len": 512,
        "output_dir": str(folder / "out"), "optimizer": "adamw_torch", "num_epochs": 1,
    }  # fmt: skip
    (folder / "train.yaml").write_text(yaml.safe_dump(values))
    return [str(bin / "axolotl"), "train", str(folder / "train.yaml"), "--launcher", "python"]


HOSTS = {
    **{f"transformers-{v}": Host(f"transformers=={v}", ("torchvision",), tests) for v in
       ("5.6.0", "5.16.1", "5.19.0", "5.23.0")},  # before 5.19 some processors need torchvision
    "lightning": Host("lightning==2.6.6", (), lightning),
    "llama-factory": Host("llamafactory==0.9.5", (), llama_factory),
    "ms-swift": Host("ms-swift==4.6.0", ("qwen-vl-utils", "torchvision"), ms_swift),
    "axolotl": Host("axolotl==0.19.0", (), axolotl),
}  # fmt: skip


def install(name: str, host: Host) -> str | None:
    """Make the environment of a host, if it isn't there. Returns why it can't be, if so."""
    folder = ENVIRONMENTS / name
    stamp, needs = folder / "requirements.txt", "\n".join([host.release, *host.more])
    if stamp.exists() and stamp.read_text() == needs:
        return None
    command = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)]
    subprocess.run(command, check=True)
    packages = sysconfig.get_path("purelib")
    inside = Path(packages).relative_to(sys.prefix)
    (folder / inside / "beneath.pth").write_text(packages)
    kept = ENVIRONMENTS / "kept.txt"  # torch: another would come with gigabytes for GPUs
    kept.write_text(f"torch=={metadata.version('torch').partition('+')[0]}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "-q"]
    command = [*pip, "-c", str(kept), host.release, *host.more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return next((x for x in done.stderr.splitlines() if x.startswith("ERROR")), done.stderr)
    if "+cpu" in metadata.version("torch"):
        fit_to_cpu(folder / inside)
    stamp.write_text(needs)
    return None


def fit_to_cpu(packages: Path) -> None:
    """Let torchvision and torchaudio be imported beside torch's CPU build: what PyPI has of them
    was built for the other one. Their compiled operators are not there then; no host here calls
    one."""
    for library in packages.glob("torchaudio/lib/*.so"):
        library.unlink()
    extension = packages / "torchvision/extension.py"
    if extension.exists():
        with open(extension, "a") as file:
            file.write(DECLARED)


def run(name: str, host: Host) -> str:
    """What came of a host, in a line; one that begins with `failed` is a failure."""
    folder = ENVIRONMENTS / name / "work"
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir(parents=True)
    write_samples(folder)
    command = host.command(ENVIRONMENTS / name / "bin", folder)
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "AXOLOTL_DO_NOT_TRACK": "1"}
    environment = os.environ | offline | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    log = folder / "log.txt"
    with open(log, "w") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=file, env=environment, cwd=ROOT, timeout=LIMIT
            )
        except subprocess.TimeoutExpired:
            return f"failed: not done after {LIMIT} s (see {log})"
    last = (log.read_text().splitlines() or [""])[-1]
    if done.returncode:
        return f"failed: {last} (see {log})"
    return last if host.command is tests else trained(folder, log)


def trained(folder: Path, log: Path) -> str:
    """What a training's log says was sparse."""
    states = sorted(folder.glob("out/**/trainer_state.json"), key=lambda file: file.stat().st_mtime)
    if states:
        rows = [x for x in json.loads(states[-1].read_text())["log_history"] if "loss" in x]
    else:  # Lightning's
        tables = [csv.DictReader(file.open()) for file in folder.glob("out/**/metrics.csv")]
        rows = [row for table in tables for row in table]
    kept = {round(float(row.get("sts_keep_ratio", 1)), 2) for row in rows}
    layers = [float(row.get("sts_layers_run", 0)) for row in rows]
    is_sparse = "sts: trains sparsely" in log.read_text() and max(kept, default=1) < 0.7
    text = f"{len(rows)} steps, keep ratio {sorted(kept)}, layers run {layers}"
    return text if is_sparse and len(rows) == STEPS else f"failed: not sparse: {text} (see {log})"


def main(names: Sequence[str]) -> int:
    """Run hosts, print the table. Returns the process's status."""
    table = []
    for name in names or HOSTS:
        host = HOSTS[name]
        problem = install(name, host)
        result = f"not run: {problem}" if problem else run(name, host)
        table.append(f"| {name} | {host.release} | {result} |")
        print(table[-1], flush=True)
    print("\n".join(["", "| host | release | result |", "|---|---|---|", *table]))
    return int(any("| failed" in row for row in table))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *HOSTS])
    sys.exit(main(parser.parse_args().names))
