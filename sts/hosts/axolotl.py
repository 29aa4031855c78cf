"""STS in axolotl, as a plug-in of its configuration:

    plugins: [sts.hosts.axolotl.SparsePlugin]
    sts: {vtc: {kind: random, keep: 0.5}, lds: {policy: sts, rate: 0.5, epsilon: 1.0}, seed: 0}

Axolotl prints an ImportError of a plug-in and goes on without it, and drops keys that nobody asked
for. So what may fail here raises another error, the key is required, and the log says "sts: trains
sparsely" when a training begins: without that line it is dense.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

try:
    from sts.hosts import callback_of, check_settings
except ImportError as error:
    raise RuntimeError(f"sts can't be imported, so nothing would be sparse: {error}") from error


class SparseArgs(BaseModel):
    """What the plug-in adds to axolotl's configuration."""

    sts: dict[str, Any]

    @field_validator("sts")
    @classmethod
    def _check(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return check_settings(settings)


class SparsePlugin(BasePlugin):
    """Gives axolotl's trainer the callback of `sts`."""

    def get_input_args(self) -> str:
        """The class with the plug-in's keys."""
        return f"{__name__}.{SparseArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list:
        """The callback; the model is the one that is trained, whatever adapters it got."""
        return [callback_of(cfg.sts.to_dict())]
