# What the rules share: the plan, and what a job reads, follows and takes. Only snakemake and what it
# depends on may be imported: with --use-conda the jobs have another environment.
import os
from collections.abc import Mapping
from functools import cache, reduce
from pathlib import Path

from snakemake.dag import DAG
from snakemake.exceptions import WorkflowError

from sts.pipeline.config import (
    CODE,
    MINI,
    SHIPPED,
    SMOLLM2,
    SPLITS,
    ConfigError,
    config_hash,
    datasets,
    deep_merge,
    load_ablations,
    load_yaml,
    parse_yaml,
    validate,
)
from sts.pipeline.data.origins import stamp, state
from sts.pipeline.files import sha256_file
from sts.pipeline.plan import MAIN, make_plan, unique
from sts.pipeline.plan import figures as figure_inputs
from sts.pipeline.run import follows
from sts.pipeline.tasks.registry import hub_set_of

ABLATIONS = "workflow/ablations.yaml"


def typed(value):
    """The value of `--config key=value`, in whose lists and mappings Snakemake leaves text."""
    if isinstance(value, Mapping):
        return {key: typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [typed(inner) for inner in value]
    return parse_yaml(value, "--config") if isinstance(value, str) else value


def checked_plan():
    """The plan of this call's scale; all of it is checked before any job. Files are read anew:
    Snakemake's own reader lets a doubled key pass and takes 1e-3 for text."""
    files, values = workflow.config_settings.configfiles, workflow.config_settings.config
    try:
        content = reduce(deep_merge, [*map(load_yaml, [MINI, *files]), typed(values)])
        file = next(iter(files), MINI)
        return make_plan(validate(content, file), load_ablations(ABLATIONS), file, tolerant=True)
    except ConfigError as error:
        raise WorkflowError(str(error)) from None


PLAN = checked_plan()
CONFIGS, SCALE, RESULTS = PLAN.configs, PLAN.scale, PLAN.results
REFERENCE = Path(f"workflow/reference/{SCALE.scale}.yaml")  # published scores


pathvars:
    results=RESULTS,
    data=f"data/{SCALE.scale}",


wildcard_constraints:
    ablation="|".join(CONFIGS),
    seed=r"\d+",
    stage="|".join(unique(stage for config in CONFIGS.values() for stage in config.stages)),
    dataset=r"[a-z][a-z0-9_]*",
    split="|".join(SPLITS),
    group="|".join(PLAN.tables),
    figure="|".join(figure_inputs()),


# ---- files --------------------------------------------------------------------------------------


def config_file(ablation):
    return f"{RESULTS}/configs/{ablation}.yaml"


def prepared(datasets):
    return [f"data/{SCALE.scale}/{name}/manifest.json" for name in unique(datasets)]


def benchmark_data(ablation):
    config = CONFIGS[ablation]
    return prepared(config.evaluation_data() + config.hub_benchmarks())


def fetched_models(ablations):
    """Backbone manifests of models that are not of this repository."""
    return unique(PLAN.backbone(id) for id in ablations if CONFIGS[id].model.sources)


def tables(names):
    return [f"{RESULTS}/tables/{name}.md" for name in names]


def runs_of(table, stage=None):
    """Manifests of the runs that a table shows, which the scale must be able to make."""
    if error := PLAN.why_not(table):
        raise WorkflowError(str(error))
    return PLAN.run_files(table, stage)


def figures(names):
    return [f"{RESULTS}/figures/{name}.svg" for name in names]


@cache
def page_tables():
    """{file: whether this call makes it} of the tables on the page: the main one, and what is there
    or among the targets. A table that nobody has asked for is shown as it is, not made anew."""
    words = set(map(str, workflow.dag_settings.targets))
    made = {file for word in words for file in [word, *(TARGETS | SHORT_TARGETS).get(word, ())]}
    made |= {*tables([MAIN, *({"expected"} & words)])}
    files = tables(unique([MAIN, *PLAN.tables, "expected"]))
    return {file: file in made for file in files if file in made or Path(file).exists()}


TARGETS = {name: target.files for name, target in PLAN.targets().items() if target.files}
# Tables with data or a model of their own have a short name too.
SHORT_TARGETS = {
    name: tables([name]) for name in PLAN.tables if name not in PLAN.tables_with_baseline()
}


def check_table_names():
    """Refuse a table with the name of a rule, which could not be told from it."""
    for name in PLAN.tables:
        if workflow.is_rule(name) or name in TARGETS:
            key = f"{PLAN.members(name)[0]}.groups"
            accepted = "another name: this one is a rule's (snakemake --list)"
            raise WorkflowError(str(ConfigError(ABLATIONS, key, name, accepted)))


def check_targets():
    """Have a word of the call that is neither a target nor a file refused, with the nearest target.
    Which words there are Snakemake knows only after it has read this."""
    begin = DAG.init

    async def checked(dag, *args, **kwargs):
        for word in map(str, dag.targetfiles):
            if not any(it.is_producer(word) for it in dag.rules) and not Path(word).exists():
                accepted = f"one of {', '.join([*PLAN.targets(), *SHORT_TARGETS])}, or a file"
                raise WorkflowError(str(ConfigError("command line", "target", word, accepted)))
        await begin(dag, *args, **kwargs)

    DAG.init = checked


# ---- stages -------------------------------------------------------------------------------------


def stage_of(wildcards):
    """The block of the stage that a job trains."""
    return CONFIGS[wildcards.ablation].stage(wildcards.stage)


def evaluation_of(wildcards):
    """The block of a run's last stage, whose threads its evaluation has too, with the processes of
    that."""
    config = CONFIGS[wildcards.ablation]
    processes = {"processes": config.evaluate.processes, "nodes": 1}
    return config.stage(config.last).model_copy(update=processes)


def trained_by(itself):
    """Pattern of the ablations that train a stage themselves, or of those that share it; what
    follows in the path says which stage."""
    stages_of = {
        id: [stage for stage in config.stages if PLAN.trains(id, stage) == itself]
        for id, config in CONFIGS.items()
    }
    patterns = [
        rf"{id}(?=/seed\d+/(?:{'|'.join(stages)})\.)" for id, stages in stages_of.items() if stages
    ]
    return "|".join(patterns) or "-"


# ---- what a job follows: formulas and files, not comments -----------------------------------------


def code(*files):
    """Of files of the package, and all that they import."""
    return follows.code(*follows.imported(CODE / file for file in files))


def training_code(ablation, *stages, also=()):
    """Of the training of stages of an ablation, and of other files of the pipeline."""
    config = CONFIGS[ablation]
    files = {CODE / "pipeline" / name for name in also}
    for stage in stages:
        files |= {*follows.training(config.stage(stage), config.model.family)}
    return follows.code(*sorted(files))


def backbone_code(ablation):
    """Of a backbone manifest: the repository's backbones, byte by byte; of other folders, which may
    be large, names, sizes and dates."""
    model = CONFIGS[ablation].model
    names = ["model.py", "joined.py", *(["shallow.py"] if model.layers_share < 1 else [])]
    writers = [CODE / "pipeline/train" / name for name in names]
    folders = [folder for folder in model.sources or [SHIPPED] if folder != SMOLLM2]
    paths = [path for folder in folders for path in sorted(Path(folder).rglob("*"))]
    files = [path for path in paths if path.is_file()]
    if not model.sources:
        return follows.code(*writers, *files)
    stamps = [(str(file), *stamp(file)) for file in files]
    return [follows.code(*writers), stamps]


def preparation(dataset):
    """A hash of the values that the prepared rows of a data set depend on."""
    of_set = SCALE.data.custom.get(dataset) or getattr(SCALE.data, dataset, "")
    values = {"max_text_chars": SCALE.data.max_text_chars}
    for key in ("rows", "folders"):
        if dataset in getattr(SCALE.data, key):
            values[key] = getattr(SCALE.data, key)[dataset]
    if wanted := hub_set_of(dataset):  # of a benchmark
        values["hub_set"] = wanted
    hub = getattr(of_set, "hub", None)
    if hub and Path(hub).is_dir():  # a file more
        values["files"] = sorted(map(str, Path(hub).glob(of_set.files)))
    return config_hash(of_set, values)


@cache
def origins(dataset):
    """A word for the files of the user's that a prepared data set comes from."""
    return state(f"data/{SCALE.scale}/{dataset}/manifest.json")


def preparation_code(dataset):
    if dataset not in (*datasets(), *SCALE.data.custom):
        return code("pipeline/data/benchmark_sets.py")
    source = datasets().get(dataset, CODE / "pipeline/data/registry.py")
    return code("pipeline/data/prepare.py", str(source.relative_to(CODE)))
