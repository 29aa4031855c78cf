# What the rules share: the checked configuration, which run is whose, what a job follows, and what
# makes the bare command safe. Only snakemake and what it depends on may be imported here: with
# --use-conda the jobs have another environment.
import fcntl
import os
import re
import shlex
import shutil
import sys
import time
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError

from sts.pipeline.tasks import registry as benchmarks
from sts.pipeline.run import cluster
from sts.pipeline import config as settings
from sts.pipeline.run import follows
from sts.pipeline.run.device import gpu_count
from sts.pipeline.run.provenance import missing_packages


def typed(value):
    """The value of `--config key=value`, in whose lists and mappings Snakemake leaves text."""
    if isinstance(value, Mapping):
        return {key: typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [typed(inner) for inner in value]
    return yaml.safe_load(value) if isinstance(value, str) else value


def checked():
    """(scale, resolved configuration of each ablation, ablations): all checked before any job."""
    try:
        for file in workflow.configfiles:
            settings.load_yaml(file)  # Snakemake's own reader lets a doubled key pass
        given = typed(workflow.config_settings.config)
        scale = settings.validate(settings.deep_merge(config, given), workflow.configfiles[0])
        ablations = settings.load_ablations("workflow/ablations.yaml")
        resolved = {id: settings.resolve(scale, entry) for id, entry in ablations.items()}
        return scale, resolved, ablations
    except settings.ConfigError as error:
        raise WorkflowError(str(error)) from None


BASE, CONFIGS, ABLATIONS = checked()
BASELINE = next(iter(CONFIGS))
RESULTS = f"results/{BASE.scale}"
TABLES = ["main", "components", "compressor", "skipper", "architectures"]
REAL = ["real", "real_lm"]  # tables that need a mirror or the internet
FIGURES = sorted(file.stem for file in (settings.CODE / "pipeline/report/figures").glob("[!_]*.py"))
GPUS = gpu_count()
CODE = settings.CODE
REFERENCE = Path(f"workflow/reference/{BASE.scale}.yaml")  # published scores
SMOLLM2 = "data/smollm2"  # of the rows `real_lm`
CONDA = "conda" in map(str, workflow.deployment_settings.deployment_method)

# Whether jobs run on a cluster, for which --jobs is given; so it is in the jobs themselves.
CLUSTER = workflow.remote_exec or workflow.nodes is not None
REQUESTS = f"{RESULTS}/requests.json"

# A job takes as many GPUs as it has processes, where there are any: --cores alone doesn't limit
# GPUs. `setdefault` leaves --resources gpu=N the last word. The GPUs here say nothing of those of a
# cluster, which has as many as its scheduler finds, and with --resources gpu=0 none; its jobs are
# not given --resources, but the environment.
limit = os.getenv("STS_GPUS") if CLUSTER else GPUS
if limit:
    workflow.global_resources.setdefault("gpu", int(limit))
limit = workflow.global_resources.get("gpu").value
if CLUSTER and limit is not None:
    os.environ.update(STS_GPUS=str(limit))

# Jobs share these: the environment of this interpreter (also when it was not activated), and one
# name for this call, under which MLflow gathers them.
path = [str(Path(sys.executable).parent), *os.get_exec_path()]
os.environ.update(PATH=os.pathsep.join(path))
os.environ.setdefault("STS_INVOCATION", f"{BASE.scale} {time.strftime('%Y-%m-%d %H:%M:%S')}")


pathvars:
    results=RESULTS,
    data=f"data/{BASE.scale}",


wildcard_constraints:
    ablation="|".join(CONFIGS),
    seed=r"\d+",
    stage="|".join(dict.fromkeys(name for one in CONFIGS.values() for name in one.stages)),
    dataset=r"[a-z][a-z0-9_]*",
    split="|".join(settings.SPLITS),
    group="|".join([*TABLES, *REAL]),
    figure="|".join(FIGURES),


def once(items):
    """Each item once, in the order in which they come first."""
    return list(dict.fromkeys(items))


def config_file(ablation):
    return f"{RESULTS}/configs/{ablation}.yaml"


def members(group):
    """Ids of the ablations that a table shows."""
    return [id for id, entry in ABLATIONS.items() if group in entry.groups]


def bases(group):
    """The ablation that each one of a table is compared with; itself where others are with it."""
    ids = members(group)
    named = {ABLATIONS[id].relative_to for id in ids}
    return [ABLATIONS[id].relative_to or (id if id in named else ids[0]) for id in ids]


@cache
def modelled(ablation):
    """The first ablation that starts from the same model: one backbone manifest serves them all."""
    own = settings.config_hash(CONFIGS[ablation].model)
    return next(id for id in CONFIGS if settings.config_hash(CONFIGS[id].model) == own)


@cache
def identity(ablation, stage):
    """All that the weights of a stage depend on, and of those before it; empty where the ablation
    has no such stage."""
    names = list(CONFIGS[ablation].stages)
    past = names[: names.index(stage) + 1] if stage in names else []
    return past and [
        modelled(ablation),
        *((name, CONFIGS[ablation].stage(name).identity()) for name in past),
    ]


@cache
def owner(ablation, stage):
    """The first ablation that trains this stage, and all before it, in the same way: one training
    serves them all. None where the ablation has no such stage."""
    own = identity(ablation, stage)
    return next(id for id in CONFIGS if identity(id, stage) == own) if own else None


def owned(wildcards):
    """The manifest of the training that a stage of an ablation shares."""
    id = owner(wildcards.ablation, wildcards.stage)
    return f"{RESULTS}/runs/{id}/seed{wildcards.seed}/{wildcards.stage}.json"


def stage_of(wildcards):
    """The block of the stage that a job trains."""
    return CONFIGS[wildcards.ablation].stage(wildcards.stage)


def last_stage(wildcards):
    """The block of a run's last stage, whose threads its evaluation has too."""
    config = CONFIGS[wildcards.ablation]
    return config.stage(config.last)


def backbone_of(ablation):
    """The manifest of the model that a run starts from."""
    return f"{RESULTS}/backbone/{modelled(ablation)}.json"


def features_of(ablation, *stages):
    """The features of the vision tower that stages of an ablation read, if they are cached."""
    config = CONFIGS[ablation]
    found = [
        f"{RESULTS}/features/{modelled(ablation)}/{dataset}-{block.split}.json"
        for stage, block in config.stages.items()
        if stage in stages and config.reads_features(stage)
        for dataset in block.data
    ]
    return once(found)


def backbone_code(ablation):
    """What a backbone manifest follows: the repository's backbones, byte by byte; of other folders,
    which may be large, names, sizes and dates."""
    model, writer = CONFIGS[ablation].model, CODE / "pipeline" / "train/model.py"
    folders = model.sources or ["data/backbones/mini"]
    files = [
        file
        for folder in folders
        if folder != SMOLLM2  # an input of the rule
        for file in sorted(Path(folder).rglob("*"))
        if file.is_file()
    ]
    if not model.sources:
        return follows.code(writer, *files)
    seen = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [follows.code(writer), seen]


def reader(wildcards):
    """A stage of an ablation that trains on a split of a data set, whose features are computed."""
    return next(
        stage
        for id, config in CONFIGS.items()
        if modelled(id) == wildcards.ablation
        for stage, block in config.stages.items()
        if block.split == wildcards.split and wildcards.dataset in block.data
    )


def start_of(wildcards):
    """What a stage starts from: the manifest of the one before, or of the backbones."""
    before = CONFIGS[wildcards.ablation].before(wildcards.stage)
    if before == settings.BACKBONE:
        return backbone_of(wildcards.ablation)
    return f"{RESULTS}/runs/{wildcards.ablation}/seed{wildcards.seed}/{before}.json"


def last_of(wildcards):
    """The manifest of a run's last stage."""
    last = CONFIGS[wildcards.ablation].last
    return f"{RESULTS}/runs/{wildcards.ablation}/seed{wildcards.seed}/{last}.json"


def trained_by(mine):
    """Pattern of the ablations that train a stage themselves, or of those that share it; what
    follows in the path says which stage."""
    every = {
        id: [name for name in one.stages if (owner(id, name) == id) == mine]
        for id, one in CONFIGS.items()
    }
    return (
        "|".join(
            rf"{id}(?=/seed\d+/(?:{'|'.join(names)})\.)" for id, names in every.items() if names
        )
        or "-"
    )


def run_files(group, name=None):
    """A result file of every run that a table shows: `name`, or the manifests of its stages."""
    return [
        f"{RESULTS}/runs/{id}/seed{seed}/{file}.json"
        for id in members(group)
        for seed in CONFIGS[id].seeds
        for file in ([name] if name else CONFIGS[id].stages)
    ]


def drawn_from(wildcards):
    """The result files that a figure shows."""
    return {
        "pareto": [*run_files("main", "eval"), f"{RESULTS}/bench/main.json"],
        "tokens": [f"{RESULTS}/tokens.json"],
    }.get(wildcards.figure, run_files("main"))


def prepared(datasets):
    return [f"data/{BASE.scale}/{name}/manifest.json" for name in once(datasets)]


def tables(names):
    return [f"{RESULTS}/tables/{name}.md" for name in names]


def figures(names):
    return [f"{RESULTS}/figures/{name}.svg" for name in names]


TARGETS = {
    **{f"table_{name}": tables([name]) for name in TABLES},
    **{f"fig_{name}": figures([name]) for name in FIGURES},
    **{name: tables([name]) for name in REAL},
    "ablations": tables(TABLES),
}


def code(*files):
    """What these files of the package compute, and all that they import: a job that has it as a
    param follows formulas, not comments."""
    return follows.code(*follows.imported(CODE / file for file in files))


def evaluation_code(ablation):
    """Code of an evaluation, and the files of its benchmarks."""
    asked = CONFIGS[ablation].evaluate.benchmarks
    return follows.code(
        *follows.imported([CODE / "pipeline" / "evaluate/evaluate.py"]), *benchmarks.sources(asked)
    )


def training_code(ablation, *stages, also=()):
    """Code of the training of stages of an ablation, and of the FLOPs in their manifests."""
    config = CONFIGS[ablation]
    blocks = [config.stage(stage) for stage in stages]
    files = {file for block in blocks for file in follows.training(block, config.model.family)}
    files |= {CODE / "pipeline" / name for name in ("cost/flops.py", "cost/history.py", *also)}
    return follows.code(*sorted(files))


def preparation(dataset):
    """The settings that the prepared rows of a data set depend on."""
    own = BASE.data.custom.get(dataset) or getattr(BASE.data, dataset, "")
    rows = {"rows": BASE.data.rows[dataset]} if dataset in BASE.data.rows else {}
    return settings.config_hash(own, {"max_text_chars": BASE.data.max_text_chars, **rows})


def preparation_code(dataset):
    own = settings.datasets().get(dataset, CODE / "pipeline" / "data" / "custom.py")
    return code("pipeline/data/prepare.py", str(own.relative_to(CODE)))


def stages(group):
    """The stages of the members of a group."""
    return [block for id in members(group) for block in CONFIGS[id].stages.values()]


def timing_threads(wildcards):
    """The benchmark of time has all cores here; on a cluster a node, but what a training has."""
    return max(map(cores, stages(wildcards.group))) if CLUSTER else workflow.cores


def cores(stage):
    """CPU cores of a training, on each of its nodes."""
    return stage.threads * stage.processes // stage.nodes


def gpus(processes=1):
    """GPUs that a job of so many processes asks for, where there may be any."""
    return processes if CLUSTER or GPUS else 0


def launch(stage):
    """How a verb is started for a stage: one process, or one for each GPU. On several nodes, Slurm
    starts a torchrun on each; they meet on the first, where the job's script runs."""
    here = stage.processes // stage.nodes
    if stage.processes == 1:
        return "python -m sts"
    if stage.nodes == 1:
        return f"torchrun --standalone --nproc-per-node {here} -m sts"
    return (
        f"srun --nodes {stage.nodes} --ntasks {stage.nodes} --cpus-per-task {cores(stage)}"
        f" --kill-on-bad-exit torchrun --nnodes {stage.nodes} --nproc-per-node {here}"
        " --rdzv-backend c10d --rdzv-id $SLURM_JOB_ID"
        " --rdzv-endpoint $(hostname):$((20000 + SLURM_JOB_ID % 10000)) -m sts"
    )


def asked(job):
    """The resources `mem_mb` and `runtime` (minutes) of the jobs of a rule, on a cluster: as much
    as the estimate says, at each further attempt as much more. job: pattern of their names in
    REQUESTS."""

    def of(name):
        def resource(wildcards, attempt):
            return attempt * cluster.request(REQUESTS, job.format(wildcards=wildcards))[name]

        return resource

    return {name: of(name) for name in cluster.UNKNOWN if CLUSTER}


def spread():
    """The resources of a training on several nodes, of which others have none: Snakemake's plugin
    then leaves it to `launch` to call srun, with a task and as many GPUs on each node."""
    if not CLUSTER:
        return {}

    def of(resource):
        return lambda wildcards: (
            resource(stage_of(wildcards)) if stage_of(wildcards).nodes > 1 else None
        )

    there_are = workflow.global_resources.get("gpu").value != 0
    return {
        "mpi": of(lambda stage: "srun"),
        "tasks": of(lambda stage: stage.nodes),
        "tasks_per_gpu": of(lambda stage: 0),  # none of its own
        "gres": of(lambda stage: f"gpu:{stage.processes // stage.nodes}" if there_are else None),
    }


def write_configs():
    """One resolved configuration for each ablation, which the jobs read; before the first job and
    not while reading the Snakefile, so that a dry run beside a running one changes nothing."""
    for id, resolved in CONFIGS.items():
        file, text = Path(config_file(id)), settings.dump(resolved)
        if not file.exists() or file.read_text() != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            part.write_text(text)
            part.replace(file)


@cache
def unable():
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
    if unable():
        raise WorkflowError(unable())
    if CLUSTER and shutil.which("srun"):
        return
    for job in workflow.dag.needrun_jobs():
        if job.rule.name == "train" and (nodes := stage_of(job.wildcards).nodes) > 1:
            key = f"{job.wildcards.ablation}: stages.{job.wildcards.stage}.nodes"
            raise WorkflowError(f"{key}: {nodes} is not accepted without Slurm: 1")


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
    if (begun or any(Path(".snakemake/locks").glob("*"))) and unable():
        print(f"The call before this one was killed, and {unable()}", file=sys.stderr)
        return
    shutil.rmtree(".snakemake/locks", ignore_errors=True)
    for marker in begun:
        Path(urlsafe_b64decode(marker.name).decode()).unlink(missing_ok=True)
        marker.unlink()


def redate_future():
    """Give inputs that are dated later than now, as the clock went back or was ahead on the machine
    that made them, the date of now: Snakemake throws away an output that is older than an input."""
    now = time.time()
    inputs = {Path(file) for job in workflow.dag.needrun_jobs() for file in job.input}
    for file in inputs:
        if file.exists() and file.stat().st_mtime > now:
            with suppress(OSError):  # of another user, or read-only: Snakemake will say so
                os.utime(file, (now, now))


def show_failed_logs(records, lines=30):
    """The end of the log file of each job that failed, by what Snakemake's own log says of them."""
    said = "".join(Path(record).read_text() for record in records)
    lists = re.findall(r"log: (.+) \(check log", said)  # of a cluster's job its own log too
    for name in dict.fromkeys(name for names in lists for name in names.split(", ")):
        if Path(name).exists():
            text = [line.rsplit("\r", 1)[-1] for line in Path(name).read_text().split("\n")]
            print(f"\n--- {name}", *text[-lines:], "---", sep="\n", file=sys.stderr)


def job_python():
    """The interpreter of the jobs."""
    used = workflow.dag.conda_envs.values()
    return f"{next(iter(used)).address}/bin/python" if CONDA and used else "python"


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
        return "make report" + ("" if BASE.scale == "mini" else f" SCALE={BASE.scale}")
    command = ["snakemake", "--report", f"{RESULTS}/report.html"]
    given = workflow.config_settings
    files = [os.path.relpath(file) for file in given.configfiles]
    for flag, values in (("--configfile", files), ("--config", given.config_args)):
        command += [flag, *values] if values else []
    return ("" if find_spec("pygments") else "pip install pygments; ") + shlex.join(command)
