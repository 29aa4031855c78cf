"""A small configuration of LLaVA's two stages."""

from sts.pipeline.config import Config

# What a stage must say
RECIPE = {
    "data": ["scenes"], "steps": 200, "batch_size": 32, "lr": 1e-3, "precision": "fp32",
    "processes": 1, "parallel": "ddp", "gradient_checkpointing": False,
}  # fmt: skip


def two_stages(align: dict, instruct: dict, **more) -> Config:
    """Align trains the projector, instruct the language model too; `more` of the configuration."""
    return Config(
        scale="tiny",
        stages={
            "align": RECIPE | {"trains": ["projector"], **align},
            "instruct": RECIPE | {"trains": ["projector", "language_model"], **instruct},
        },
        **more,
    )


def short(**stage) -> Config:
    """Both stages with a few small steps; `stage` gives values of both."""
    few = {"steps": 4, "batch_size": 4, "lr": 1e-2, "checkpoint_every": 2, "max_length": 256}
    return two_stages(few | stage, few | stage)
