"""Typed configuration: what a scale and an ablation may say, and what every value means.

The blocks hold the defaults. `workflow/config/mini.yaml` gives the recipe of the mini scale,
another *scale* file (`workflow/config/*.yaml`) what differs from it, and an entry of
`workflow/ablations.yaml` is a named delta of a scale. Everything is checked before anything runs;
a `ConfigError` names the file, the key, the value and what is accepted. Only pydantic and yaml are
needed, so that the workflow reads it in any environment.
"""

from sts.pipeline.config.base import CODE, MINI, NAME, Block, Line, Name, datasets, deep_merge, line
from sts.pipeline.config.blocks import (
    REPEATS,
    BenchConfig,
    Config,
    CustomConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
)
from sts.pipeline.config.errors import ConfigError
from sts.pipeline.config.identity import ALWAYS, Neutral, config_hash, identity
from sts.pipeline.config.inputs import SHIPPED, SMOLLM2, check_inputs, model_folder
from sts.pipeline.config.loading import (
    Ablation,
    Entry,
    dump,
    load_ablations,
    load_scale,
    load_yaml,
    parse_yaml,
    resolve,
    validate,
)
from sts.pipeline.config.search import (
    Range,
    SearchConfig,
    check_study,
    load_search,
    nested,
    value_at,
)
from sts.pipeline.config.stages import (
    BACKBONE,
    RESERVED,
    SPLITS,
    VALIDATION,
    LoraConfig,
    StageConfig,
)
