# What a job takes, here and on a cluster: cores, GPUs, memory, time.
from sts.pipeline.run import cluster
from sts.pipeline.run.device import gpu_count

GPUS = gpu_count()
# Whether jobs run on a cluster, for which --jobs is set; so it is in the jobs themselves.
CLUSTER = workflow.remote_exec or workflow.nodes is not None
REQUESTS = f"{RESULTS}/requests.json"

# A job takes as many GPUs as it has processes, where there are any: --cores alone doesn't limit
# GPUs. `setdefault` leaves --resources gpu=N the last word. The GPUs here say nothing of those of a
# cluster, which has as many as its scheduler finds, and with --resources gpu=0 none; its jobs don't
# get --resources, but the environment.
limit = os.getenv("STS_GPUS") if CLUSTER else GPUS
if limit:
    workflow.global_resources.setdefault("gpu", int(limit))
limit = workflow.global_resources.get("gpu").value
if CLUSTER and limit is not None:
    os.environ.update(STS_GPUS=str(limit))


def timing_threads(wildcards):
    """The benchmark of time has all cores here; on a cluster a node, but what a training has."""
    return max(map(cluster.cores, PLAN.stages(wildcards.group))) if CLUSTER else workflow.cores


def gpus(processes=1):
    """GPUs that a job of so many processes asks for, where there may be any."""
    return processes if CLUSTER or GPUS else 0


def requested(job):
    """The resources `mem_mb` and `runtime` (minutes) of the jobs of a rule, on a cluster: what the
    estimate says, at each further attempt as much more. job: pattern of their names in REQUESTS."""

    def of(name):
        def resource(wildcards, attempt):
            return attempt * cluster.request(REQUESTS, job.format(wildcards=wildcards))[name]

        return resource

    return {name: of(name) for name in cluster.UNKNOWN if CLUSTER}


def widest_of_group(wildcards):
    """The block with the most processes of the stages that a timing takes."""
    return max(PLAN.stages(wildcards.group), key=lambda stage: (stage.processes, stage.nodes))


def several_nodes(stage_of):
    """The resources of a training on several nodes, of which others have none: Snakemake's plugin
    then leaves it to `launch` to call srun, with a task and as many GPUs on each node."""
    if not CLUSTER:
        return {}

    def of(resource):
        return lambda wildcards: (
            resource(stage_of(wildcards)) if stage_of(wildcards).nodes > 1 else None
        )

    has_gpus = workflow.global_resources.get("gpu").value != 0
    return {
        "mpi": of(lambda stage: "srun"),
        "tasks": of(lambda stage: stage.nodes),
        "tasks_per_gpu": of(lambda stage: 0),  # none of its own
        "gres": of(lambda stage: f"gpu:{stage.processes // stage.nodes}" if has_gpus else None),
    }


def timing_command(wildcards, input, output):
    """A call for each way in which stages of the table are trained: each times its own."""
    ids = PLAN.members(wildcards.group)
    files = {
        "configs": map(config_file, ids),
        "init": map(PLAN.backbone, ids),
        "data": input.data,
        "out": output,
    }
    options = " ".join(f"--{name} {' '.join(paths)}" for name, paths in files.items())
    launches = unique(map(cluster.launch, PLAN.stages(wildcards.group)))
    return " && ".join(f"{launch} bench {options}" for launch in launches)
