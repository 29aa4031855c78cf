# What makes a call safe, before its first job and after its last: an environment that can run the
# jobs, recovery after a kill, what is said of failed jobs.
import fcntl
import re
import shlex
import shutil
import sys
import time
from base64 import urlsafe_b64decode
from contextlib import suppress
from importlib.util import find_spec

from sts.pipeline.config import dump
from sts.pipeline.files import SpoiltError, write_text_atomic
from sts.pipeline.run.provenance import missing_packages

CONDA = "conda" in map(str, workflow.deployment_settings.deployment_method)

# Snakemake takes braces in a path for wildcards, and PATH takes a colon for the end of a folder.
for place, signs in ((workflow.basedir, "{}"), (Path(sys.executable).parent, os.pathsep)):
    if {*signs} & {*str(place)}:
        raise WorkflowError(f"{place}: a path without {' and '.join(signs)} is needed: rename it")

# Jobs share these: the environment of this interpreter (also when it was not activated), and one
# name for this call, under which MLflow gathers them.
path = [str(Path(sys.executable).parent), *os.get_exec_path()]
os.environ.update(PATH=os.pathsep.join(path))
os.environ.setdefault("STS_INVOCATION", f"{SCALE.scale} {time.strftime('%Y-%m-%d %H:%M:%S')}")


# ---- before the first job -----------------------------------------------------------------------


def write_configs():
    """One resolved configuration for each ablation, which the jobs read; before the first job and
    not while reading the Snakefile, so that a dry run beside a running one changes nothing."""
    for id, resolved in CONFIGS.items():
        file, text = Path(config_file(id)), dump(resolved)
        if not file.exists() or file.read_text() != text:
            write_text_atomic(file, text)


@cache
def why_unable():
    """Why the jobs can't run in this environment; "" if they can."""
    missing = [] if CONDA else missing_packages(CODE)
    return missing and (
        f"{sys.executable} can't run the jobs, it lacks: {', '.join(missing)}.\n"
        "Add --use-conda, or use an environment that has them: `make reproduce` makes one, and so "
        "does `pip install -r requirements.lock`.\nNothing was deleted, no job was started."
    )


def check_environment():
    """Stop before Snakemake deletes the outputs of jobs that can only fail here."""
    if workflow.touch:
        return
    if why_unable():
        raise WorkflowError(why_unable())
    if CLUSTER and shutil.which("srun"):
        return
    for job in workflow.dag.needrun_jobs():
        check_machine(job)


def check_machine(job):
    """Raise WorkflowError for a job of more nodes or GPUs than this machine has; Snakemake would
    start it on those that there are."""
    blocks = {"train": stage_of, "evaluate": evaluation_of}
    if job.rule.name not in blocks:
        return
    block = blocks[job.rule.name](job.wildcards)
    name = "evaluate" if job.rule.name == "evaluate" else f"stages.{job.wildcards.stage}"
    key = f"{job.wildcards.ablation}: {name}"
    if block.nodes > 1:
        raise WorkflowError(f"{key}.nodes: {block.nodes} is not accepted without Slurm: 1")
    if 0 < GPUS < block.processes:
        accepted = f"at most {GPUS}, the GPUs of this machine"
        raise WorkflowError(f"{key}.processes: {block.processes} is not accepted: {accepted}")


def warn_of_ablations():
    """Say which ablation is left out, and which doesn't have the time that it is to have."""
    for error in PLAN.refused.values():
        print(f"No table of this call shows it, so the call goes on: {error}", file=sys.stderr)
    with suppress(SpoiltError):  # left to whoever reads the timing
        for text in PLAN.unlike_timing():
            print(text, file=sys.stderr)


def prepare_cluster():
    """Before the first job of a cluster: end those that a killed call has left, which would hold
    what the same jobs of this one wait for, and ask the estimate what the jobs need."""
    if not CLUSTER or workflow.touch:
        return
    if workflow.execution_settings.lock:  # else another call may be alive here
        try:
            left = cluster.cancel_left_jobs(workflow.workdir_init)
        except RuntimeError as error:
            raise WorkflowError(str(error)) from None
        if left:
            print(f"Cancelled what a killed call left in Slurm: {', '.join(left)}", file=sys.stderr)
    python, files = job_python(), [config_file(id) for id in CONFIGS]
    flag = "--no-gpus" if workflow.global_resources.get("gpu").value == 0 else "--gpus"
    shell(
        "{python} -m sts requests {flag} --configs {files} --out {REQUESTS}"
        " || echo 'No estimate: jobs ask for what cluster.py says' >&2"
    )


def recover_from_kill():
    """After `kill -9` or a power cut, clear what would stop the next call: Snakemake's lock, and
    outputs that were not finished (small files: the trainings themselves go on where they were).

    The kernel frees our own lock with the process that held it: whoever gets it is alone.
    """
    global ALIVE  # open, and so locked, as long as this process lives
    Path(".snakemake").mkdir(exist_ok=True)
    ALIVE = open(".snakemake/alive", "w")
    try:
        fcntl.flock(ALIVE, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # Snakemake refuses, or says that outputs just written are incomplete
        print("Another call is at work in this folder: wait until it ends", file=sys.stderr)
        return
    except OSError:  # no locks here: left to Snakemake
        return
    if not cluster.locks_reach_other_hosts("."):
        return  # a call on another host may be at work
    begun = [path for path in Path(".snakemake/incomplete").glob("*") if path.is_file()]
    if (begun or any(Path(".snakemake/locks").glob("*"))) and why_unable():
        print(f"The call before this one was killed, and {why_unable()}", file=sys.stderr)
        return
    shutil.rmtree(".snakemake/locks", ignore_errors=True)
    for marker in begun:
        Path(urlsafe_b64decode(marker.name).decode()).unlink(missing_ok=True)
        marker.unlink()


def is_call_alive():
    """Whether a call that runs jobs is at work in this folder; it holds the lock of
    `recover_from_kill`."""
    if not Path(".snakemake/alive").exists():
        return False
    with open(".snakemake/alive") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no locks here
            pass
    return False


def count_begun():
    """A dry run counts outputs that a call has begun as to be made: Snakemake would end with advice
    that harms a call that is alive (--rerun-incomplete), and after a kill isn't needed."""

    if is_call_alive():
        text = "Another call is at work in this folder: what it has begun counts here as to be made"
        print(text, file=sys.stderr)

    async def force(dag):
        dag.forcefiles.update(await dag.incomplete_files())

    DAG.check_incomplete = force


def redate_future():
    """Date inputs that are dated later than now (the clock went back, or was ahead on the machine
    that made them) at now: Snakemake throws away an output that is older than an input."""
    now = time.time()
    inputs = {Path(file) for job in workflow.dag.needrun_jobs() for file in job.input}
    for file in inputs:
        if file.exists() and file.stat().st_mtime > now:
            with suppress(OSError):  # of another user, or read-only: Snakemake will say so
                os.utime(file, (now, now))


# ---- after the last job -------------------------------------------------------------------------


def show_failed_logs(records, lines=30):
    """The end of the log file of each job that failed, by what Snakemake's own log says of them."""
    record = "".join(Path(file).read_text() for file in records)
    lists = re.findall(r"log: (.+) \(check log", record)  # of a cluster's job its own log too
    for name in unique(name for names in lists for name in names.split(", ")):
        if Path(name).exists():
            text = [line.rsplit("\r", 1)[-1] for line in Path(name).read_text().split("\n")]
            print(f"\n--- {name}", *text[-lines:], "---", sep="\n", file=sys.stderr)


def job_python():
    """The interpreter of the jobs."""
    environments = workflow.dag.conda_envs.values()
    return f"{next(iter(environments)).address}/bin/python" if CONDA and environments else "python"


def close_tracking(status):
    """End this call's MLflow run, its tables and figures with it, by the jobs' interpreter."""
    python = job_python()
    shell(
        "{python} -m sts close --status {status} --artifacts {RESULTS}/tables {RESULTS}/figures"
        " || true"
    )


def report_command():
    """The command that makes the report, for who called us: make, or Snakemake itself."""
    if "MAKELEVEL" in os.environ:
        return "make report" + ("" if SCALE.scale == "mini" else f" SCALE={SCALE.scale}")
    command = ["snakemake", "--report", f"{RESULTS}/report.html"]
    call = workflow.config_settings
    files = [os.path.relpath(file) for file in call.configfiles]
    for flag, values in (("--configfile", files), ("--config", call.config_args)):
        command += [flag, *values] if values else []
    return ("" if find_spec("pygments") else "pip install pygments; ") + shlex.join(command)
