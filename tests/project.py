"""The project as a user has it, for tests that call Snakemake on a copy of it.

In the copy the long work is cut short: the verbs write small results of the same shape at once. The
stand-ins keep what the real files import, as that is what jobs follow.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMOKE = "workflow/config/smoke.yaml"
BOTH = ("all", "table_components")
BIN = Path(sys.executable).parent
STANDINS = {
    "pipeline/data/prepare.py": """
def prepare(config, name, out):
    write(out, {"dataset": name, "of": config.data.model_dump_json()})""",
    "pipeline/train/model.py": """
def write_manifest(model, out): write(out, {"vision": model.backbone})""",
    "pipeline/train/train.py": """
def train(job):
    print("training", job.ablation, flush=True)
    for _ in range(600 * Path("slow").exists()): time.sleep(0.1)
    if Path("broken").exists(): raise SystemExit(f"{job.ablation}: out of memory")
    write(job.out, {"stage": job.block.identity(), "seed": job.seed, "init": hashed(job.init)})""",
    "pipeline/evaluate/evaluate.py": """
def evaluate(config, ablation, seed, run, data, out): write(out, {"run": hashed(run)})""",
    "pipeline/measure/bench.py": """
def bench(configs, data, inits, out):
    write(out, {"threads": os.environ["OMP_NUM_THREADS"], "configs": list(configs)})""",
    "pipeline/report/tables.py": """
def table(name, results, ablations, out_stem, labels, *sources):
    for end in ("md", "csv", "tex", "json", "html"):
        write(f"{out_stem}.{end}", dict.fromkeys(ablations, 1))""",
    "pipeline/measure/examples.py": """
def examples(config, backbone, data, runs, out): write(out, [hashed(run) for run in runs])""",
    "pipeline/report/page/__init__.py": """
def page(results, out, tables, *options):
    write(out, {name: hashed(f"{results}/tables/{name}.csv") for name in tables})""",
    "pipeline/report/findings.py": """
def summary(results): print("found something")""",
    "pipeline/measure/kept_tokens.py": """
def kept_tokens(backbone, data, out): write(out, {"backbone": hashed(backbone)})""",
    "pipeline/report/figures/__init__.py": """
def figure(name, results, ablations, out_stem, labels):
    for ending in ("svg", "png"): write(f"{out_stem}.{ending}", ablations)""",
}
HEAD = """
import hashlib, json, os, time
from pathlib import Path
def hashed(path): return hashlib.sha256(Path(path).read_bytes()).hexdigest()
def write(path, value):
    part = Path(f"{path}.part"); part.write_text(json.dumps(value)); part.replace(path)
    with open("done.txt", "a") as file: file.write(f"{path}\\n")
def never_called():
    pass
"""


# A small table of ablations, so that no test depends on the project's own.
ABLATIONS = """
dense: {groups: [main, components], label: Dense, source: baseline}
vtc:
  groups: [main, components]
  label: VTC
  overrides: {align: {vtc: {kind: uniform, keep: 0.5}}}
lds:
  groups: [main, components]
  label: LDS
  overrides: {instruct: {lds: {policy: sts, rate: 0.6, epsilon: 0.5}}}
both:
  groups: [main, components]
  label: Both
  overrides:
    align: {vtc: {kind: uniform, keep: 0.5}}
    instruct: {lds: {policy: sts, rate: 0.6, epsilon: 0.5}}
pool:
  groups: [components]
  label: Pooling
  overrides: {align: {vtc: {kind: avgpool2d, keep: 0.25}}}
"""


def real_project(folder: Path) -> Path:
    """A copy of what the workflow consists of, in which nothing is cut short."""
    for name in ("sts", "workflow", "envs", "data/backbones"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", folder)
    return folder


def make_project(folder: Path, ablations: str | None = None) -> Path:
    """A copy of what the workflow consists of, with stand-ins for the long work.

    ablations: text of another table of ablations than the project's own.
    """
    left_out = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for name in ("sts", "recipes", "workflow", "envs", "data/backbones"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    shutil.copy(ROOT / "Snakefile", folder)
    if ablations:
        (folder / "workflow/ablations.yaml").write_text(ablations)
    for name, text in STANDINS.items():
        file = folder / "sts" / name
        tree = ast.parse(file.read_text())
        imports = [n for n in tree.body if isinstance(n, ast.ImportFrom) and "sts" in n.module]
        kept = "".join(f"    {ast.unparse(node)}\n" for node in imports)
        file.write_text(HEAD + kept + text + "\n")
    return folder


def call(*arguments: str) -> list[str]:
    return [str(BIN / "snakemake"), "--cores", "2", "--nocolor", *arguments]


def environment(**more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("STS_", "SNAKEMAKE", "MAKE"))}
    return {**clean, "CUDA_VISIBLE_DEVICES": "", "STS_TRACKING": "off", **more}


def run(folder: Path, scale: str | None, *arguments: str, ok: bool = True, **env: str) -> str:
    """What Snakemake says; the test fails if it doesn't end as expected."""
    flags = ["--configfile", scale] if scale else []
    done = subprocess.run(
        call(*arguments, *flags), cwd=folder, env=environment(**env),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert (done.returncode == 0) is ok, output
    return output


def planned(folder: Path, *arguments: str, scale: str | None = SMOKE, **env: str) -> dict[str, int]:
    """Jobs by rule that a call would run."""
    return jobs_in(run(folder, scale, "-n", *(arguments or BOTH), **env))


def jobs_in(output: str) -> dict[str, int]:
    """Jobs by rule, by what a dry run says."""
    rows = re.findall(r"^(\w+) +(\d+)$", output.partition("Job stats:")[2], re.MULTILINE)
    return {rule: int(count) for rule, count in rows if rule != "total"}


def wait_for(condition, seconds: float = 60, what: str = "it", every: float = 0.1) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} s for {what}"
        time.sleep(every)


def edit(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))
