"""A small configuration of LLaVA's two stages."""

from sts.pipeline.config import Config


def two_stages(align: dict, instruct: dict, **more) -> Config:
    """Align trains the projector, instruct the language model too; `more` of the configuration."""
    return Config(
        scale="tiny",
        stages={
            "align": {"trains": ["projector"], **align},
            "instruct": {"trains": ["projector", "language_model"], **instruct},
        },
        **more,
    )


def short(**stage) -> Config:
    """Both stages with a few small steps; `stage` gives values of both."""
    few = {"steps": 4, "batch_size": 4, "lr": 1e-2, "checkpoint_every": 2, "max_length": 256}
    return two_stages(few | stage, few | stage)
