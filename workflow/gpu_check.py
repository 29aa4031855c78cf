"""What only a GPU can show, in one command: `make gpu-check`, or

    python -m workflow.gpu_check [--only PART ...] [--rehearse]

tests   the tests that are marked `gpu`
bench   `bench --shape` of SHAPES whole, in both stages: the paper's STS, pooling, the units of LDS;
        with each attention, with and without checkpointing, a part each; a loss in chunks is a row
        of each, and float32 weights with autocast a part
smoke   the whole pipeline at scale `smoke`, from nothing

Each part is a process of its own, which the failure of another leaves alone. The result is
results/reference/gpu/<device>.json: the machine, and of each part whether it passed, what it
measured, and if not, why. What was printed is in results/gpu_check. Status 0: no part failed.
Without a GPU nothing is run. With --only, what the file has of the other parts stays, if machine
and code are the same.

--rehearse runs bench and smoke on the CPU with shapes cut to next to nothing, for whoever changes
this file: the numbers mean nothing.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from xml.etree import ElementTree

from sts.pipeline.files import read_json, write_json_atomic
from sts.pipeline.run import provenance
from sts.pipeline.run.device import visible_gpus

LOGS = Path("results/gpu_check")
KEPT = Path("results/reference/gpu")
SMOKE = "gpu_smoke"  # a scale of its own, so that its files are nobody else's
SHAPES = ("llava-1.5-7b", "qwen2.5-vl-7b")
ATTENTION = {"sdpa": None, "flash_attention_2": "flash_attn"}  # with the package that it needs
# A GPU must be full before a saving shows; without checkpointing a card of 80 GB holds fewer.
BATCH = {"on": "16", "off": "4"}
BENCHES = [*product(SHAPES, ATTENTION, BATCH), (SHAPES[0], "sdpa", "on", "autocast")]
SETTINGS = (
    "uniform@0.5", "random@0.5", "avgpool2d@0.25",  # VTC: two of the paper's kinds, and pooling
    "sts@0.5:epsilon=1", "random@0.5+sts@0.5:epsilon=1",  # LDS and STS, as the row `sts` has them
    "layerdrop@0.5", "layerdrop@0.5:unit=samples", "random_ltd@0.5", "dropbp@0.5",  # units of LDS
)  # fmt: skip
TINY = "--layers 4 --width 0.03125 --batch 2 --text 8 --repeats 1"


class Part(NamedTuple):
    """A command; what it writes, of which nothing is left when it starts; the package it needs;
    what there is to say of its result, or a ValueError if that is none; and the seconds it has: a
    GPU that hangs must not keep the other parts waiting."""

    name: str
    command: Sequence[str]
    writes: Sequence[Path] = ()
    needs: str | None = None
    says: Callable[[], Mapping[str, Any]] = dict
    limit: int = 3600


def parts(rehearse: bool = False) -> list[Part]:
    """All parts, or those that a CPU can rehearse."""
    python = [sys.executable, "-m"]
    todo = []
    if not rehearse:
        report = LOGS / "tests.xml"
        command = [*python, "pytest", "-m", "gpu", "-n", "0", f"--junitxml={report}"]
        todo.append(Part("tests", command, [report], says=partial(counts, report)))
    for shape, attention, checkpointing, *switches in BENCHES:
        name = "-".join([shape, attention, *["checkpointing"][: checkpointing == "on"], *switches])
        out = LOGS / f"{name}.json"
        size = TINY.split() if rehearse else ["--batch", BATCH[checkpointing], "--repeats", "5"]
        command = [*python, "sts", "bench", "--shape", shape, "--attention", attention]
        command += ["--checkpointing", checkpointing, *[f"--{switch}" for switch in switches]]
        command += [*size, "--settings", *SETTINGS, "--out", str(out)]
        todo.append(Part(name, command, [out], ATTENTION[attention], partial(measured, out)))
    command = [*python, "snakemake", "--cores", "all", "--config", f"scale={SMOKE}"]
    command += ["--configfile", "workflow/config/smoke.yaml"]
    outputs = [Path("results") / SMOKE, Path("data") / SMOKE]
    says = partial(run_of, outputs[0], gpu=not rehearse)
    todo.append(Part("smoke", command, outputs, says=says))
    return todo


def counts(report: Path) -> dict[str, int]:
    """How many tests passed, by pytest's report. Raises ValueError if none did."""
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    numbers = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    passed = numbers.pop("tests") - sum(numbers.values())
    if not passed:
        raise ValueError(f"no test passed: {numbers['skipped']} were skipped")
    return {"passed": passed, **numbers}


def measured(out: Path) -> dict[str, Any]:
    """What a bench measured: medians, memory, ratios to dense, realisation, a row a setting."""
    result = read_json(out)
    return {key: result[key] for key in ("cut", "dtype", "autocast", "batch", "repeats", "rows")}


def run_of(results: Path, gpu: bool) -> dict[str, Any]:
    """What a run of the pipeline made. Raises ValueError if a training had no GPU."""
    trainings = [read_json(f) for f in sorted(results.glob("weights/*/provenance.json"))]
    on_cpu = [training for training in trainings if not training["hardware"]["gpus"]]
    if not trainings or (gpu and on_cpu):
        raise ValueError(f"of {len(trainings)} trainings {len(on_cpu)} ran without a GPU")
    return {
        "trainings": len(trainings),
        "evaluations": len(list(results.glob("runs/*/*/eval.json"))),
        "tables": len(list(results.glob("tables/*.md"))),
    }


def check(todo: Sequence[Part], about: Mapping[str, Any], kept: Path) -> bool:
    """Run the parts, one after the other; the file `kept` has what became of them after each.
    Whether none failed."""
    LOGS.mkdir(parents=True, exist_ok=True)
    before = read_json(kept) if kept.exists() else {}
    rows = before.pop("parts", {})
    rows = rows if before == about else {}
    for part in todo:
        print(f"{part.name} ... ", end="", flush=True)
        rows[part.name] = row = run(part)
        write_json_atomic(kept, {**about, "parts": rows})
        print(": ".join(filter(None, (row["status"], row.get("why")))), flush=True)
    print(f"Result: {kept}; what was printed: {LOGS}")
    return not any(rows[part.name]["status"] == "failed" for part in todo)


def run(part: Part) -> dict[str, Any]:
    """What became of a part: status (passed, failed, not run), why, seconds, what it found."""
    row = {"command": shlex.join(["python", *part.command[1:]])}
    if part.needs and find_spec(part.needs) is None:
        return row | {"status": "not run", "why": f"the package {part.needs} is not installed"}
    for path in part.writes:  # of an earlier call
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    began = time.monotonic()
    log = LOGS / f"{part.name}.log"
    with open(log, "w", encoding="utf-8") as file:
        ended = finish(part.command, file, part.limit)
    row["seconds"] = round(time.monotonic() - began, 1)
    if ended:
        return row | {"status": "failed", "why": f"{ended}: {reason(log)}"}
    try:
        return row | {"status": "passed", **part.says()}
    except (OSError, ValueError, KeyError) as error:
        return row | {"status": "failed", "why": f"no result: {type(error).__name__}: {error}"}


def finish(command: Sequence[str], file: TextIO, limit: int) -> str:
    """How a command ended, "" for well. In a session of its own, so that all it has started ends
    with it."""
    with subprocess.Popen(
        command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
    ) as job:
        try:
            code = job.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            return f"not done after {limit} s"
        except BaseException:  # Ctrl-C does not reach that session
            os.killpg(job.pid, signal.SIGTERM)
            raise
    return f"signal {-code}" if code < 0 else f"status {code}" if code else ""


def reason(log: Path) -> str:
    """The last error that a log names, else its last line; without the place of this folder and
    the name of this machine, as it is to be committed."""
    text = log.read_text(encoding="utf-8", errors="replace").replace(f"{Path.cwd()}/", "")
    text = re.sub(rf"\b{re.escape(socket.gethostname())}\b", "this machine", text)
    lines = [line.rsplit("\r", 1)[-1].strip() for line in text.split("\n")]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return ([line for line in lines if line] + errors or ["nothing was printed"])[-1][:500]


def machine() -> dict[str, Any]:
    """What a result depends on: the GPU, its driver, torch."""
    import torch  # here: without a GPU nobody waits for it

    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    query += ["-i", visible_gpus()[0]]
    answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    name, driver, memory = (cell.strip() for cell in answer.split(","))
    git = provenance.git()
    return {
        "device": name,
        "driver": driver,
        "memory": memory,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "transformers": version("transformers"),
        "commit": git["commit"],
        "edited": git["dirty"],
    }


def unable() -> str:
    """Why there is nothing to check on; "" if there is."""
    if not (shutil.which("nvidia-smi") and visible_gpus()):
        return "There is no NVIDIA GPU here: nvidia-smi names none"
    import torch

    if not torch.cuda.is_available():
        return f"There is a GPU, but torch {torch.__version__} can't use it: install a CUDA build"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """0: no part failed. 1: one did, or there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow.gpu_check", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, next to nothing")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts, by name")
    args = parser.parse_args(argv)
    kept, facts = LOGS / "rehearsal.json", {"device": "cpu"}
    if not args.rehearse:
        if why := unable():
            print(f"{why}; it would run:", file=sys.stderr)
            for part in parts():
                print(" ", shlex.join(["python", *part.command[1:]]), file=sys.stderr)
            return 1
        facts = machine()
        kept = KEPT / f"{re.sub('[^a-z0-9]+', '-', facts['device'].lower())}.json"
    todo = {part.name: part for part in parts(args.rehearse)}
    if unknown := set(args.only or ()) - set(todo):
        parser.error(f"--only: {', '.join(sorted(unknown))}: expected some of {', '.join(todo)}")
    return 0 if check([todo[name] for name in args.only or todo], facts, kept) else 1


if __name__ == "__main__":
    sys.exit(main())
