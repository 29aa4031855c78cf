"""STS in ms-swift. A file of your own, `sparse.py`, says how sparse:

    from sts import STS_LDS, STS_VTC
    from sts.hosts.ms_swift import register

    register("sts", STS_VTC, STS_LDS)

swift sft --external_plugins sparse.py --callbacks sts ...
"""

from typing import Any

from swift.callbacks import callbacks_map

from sts.hosts import HostCallback
from sts.settings import LDS, VTC


def register(name: str, vtc: VTC | None = None, lds: LDS | None = None, *, seed: int = 0) -> None:
    """Make a callback known to ms-swift, which `--callbacks NAME` puts into its trainer."""

    def callback(args: Any, trainer: Any) -> HostCallback:
        return HostCallback(None, vtc, lds, seed=seed)  # the trainer has no model yet

    callbacks_map[name] = callback
