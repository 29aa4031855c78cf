# One line that says how far the whole call is: on a terminal always the last one, in a log another
# every STS_PROGRESS seconds (180; 0: none). What it is made of is in sts/pipeline/run/progress.py.
from snakemake.logging import logger
from snakemake.settings.enums import Quietness

from sts.pipeline.run import progress


def samples(stage, steps):
    """Samples that so many steps put through the model of one process, a forward pass as one."""
    passes = 2 if stage.trains == ["projector"] else 3  # of which one for gradients of weights
    return passes * stage.batch_size * stage.gradient_accumulation_steps * steps


def job_size(job):
    """The samples of a whole job; 0 for one of some seconds, or of which nothing is known."""
    if job.rule.name == "train":
        return samples(stage_of(job.wildcards), stage_of(job.wildcards).steps)
    if job.rule.name == "timing":
        return sum(samples(stage, SCALE.bench.steps) for stage in PLAN.stages(job.wildcards.group))
    if job.rule.name == "evaluate":
        block = CONFIGS[job.wildcards.ablation].evaluate
        questions = block.limit or SCALE.data.scenes.test
        return questions * len(block.benchmarks) * (1 + block.blind) / block.processes
    return 0


def call_jobs():
    """{Snakemake's job: what sts.pipeline.run.progress knows of it}, of all jobs of this call."""
    return {
        job: progress.Job(
            kind=f"{job.rule.name} {job.wildcards_dict.get('stage', '')}",
            size=job_size(job),
            uses={name: n for name, n in job.resources.items() if isinstance(n, int)},
            needs=tuple(workflow.dag.dependencies[job]),
            steps=stage_of(job.wildcards).steps if job.rule.name == "train" else 0,
            log=Path(job.log[0]) if job.log else None,
            idle=not job.is_shell,
        )
        for job in list(workflow.dag.needrun_jobs(exclude_finished=False))
    }


def end_progress():
    """Take the line away; `show_progress` puts what does it here."""


def show_progress():
    """Begin to show the line, as a thread that no call waits for."""
    global end_progress
    try:
        every = float(os.environ.get("STS_PROGRESS", 180))
        quiet = {Quietness.ALL, Quietness.PROGRESS} & set(workflow.output_settings.quiet or ())
        if workflow.touch or quiet or not every:
            return
        handlers = {handler.name: handler for handler in logger.handlers}
        limits = workflow.scheduler.global_resources
        end_progress = progress.follow(
            call_jobs(),
            status=lambda job: (job in workflow.scheduler.running, workflow.dag.finished(job)),
            available={name: n for name, n in limits.items() if n < sys.maxsize},
            handler=handlers.get("DefaultStreamHandler"),
            say=logger.info,
            every=every,
        )
    except Exception as error:  # another Snakemake, or a wrong STS_PROGRESS: the call goes on
        logger.info(f"No lines of progress: {error!r}")
