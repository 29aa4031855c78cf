"""STS in the training programs of others: a file each, which its host alone imports."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sts.callback import SparseCallback
from sts.checks import expect, one_of
from sts.settings import LDS, VTC

log = logging.getLogger(__name__)
KEYS = ("vtc", "lds", "seed")  # of `sts` in a host's configuration


def say(vtc: VTC | None, lds: LDS | None) -> None:
    """What a sparse training has in its log and a dense one has not."""
    log.warning("sts: trains sparsely, with %s and %s", vtc, lds)


class HostCallback(SparseCallback):
    """A SparseCallback that says that it is there: a host that lost it would train dense."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        say(self.vtc, self.lds)


def check_settings(settings: Any) -> dict[str, Any]:
    """`sts` of a host's configuration: `vtc` and `lds` by field, `seed`.

    Raises:
        ValueError: It has other keys, or says nothing that is sparse.
    """
    is_mapping = isinstance(settings, Mapping)
    expect(is_mapping, "sts", settings, f"a mapping with some of {', '.join(KEYS)}")
    for key in settings:
        expect(key in KEYS, "sts", key, str(one_of(KEYS)))
    settings = {key: value for key, value in settings.items() if value is not None}
    vtc, lds = VTC(**settings.get("vtc", {})), LDS(**settings.get("lds", {}))
    expect(vtc.keep < 1 or lds.rate > 0, "sts", dict(settings), "vtc.keep below 1 or an lds.rate")
    return {"vtc": asdict(vtc), "lds": asdict(lds), "seed": settings.get("seed", 0)}


def callback_of(settings: Mapping[str, Any]) -> HostCallback:
    """The callback that `sts` of a host's configuration asks for. Raises ValueError as
    `check_settings`."""
    return HostCallback(None, **check_settings(settings))
