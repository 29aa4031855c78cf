"""One training: a stage of a run, as it was asked for, and what follows from that."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sts.pipeline.config import Config, StageConfig
from sts.pipeline.files import read_json, sha256_json
from sts.pipeline.run import follows
from sts.pipeline.run.device import attention_here, precision_here


@dataclass(frozen=True)
class Job:
    """A stage of a run. Made at the door and carried through the training; nothing in it changes.

    Attributes:
        config: Resolved configuration of the run.
        ablation: Name of the run; no weight depends on it.
        stage: Name of the stage, one of the configuration's.
        data: Manifests of the prepared data sets that the stage trains on.
        init: The backbone manifest for the first stage, else the manifest of the stage before.
        out: The manifest to write, `<results>/runs/<ablation>/seed<seed>/<stage>.json`.
    """

    config: Config
    ablation: str
    seed: int
    stage: str
    data: Sequence[Path]
    init: Path
    out: Path

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.ablation}/seed{self.seed}/{self.stage}"

    @cached_property
    def block(self) -> StageConfig:
        """The stage's part of the configuration."""
        return self.config.stage(self.stage)

    @cached_property
    def precision(self) -> str:
        """What this machine computes the forward pass in: `fp32` or `bf16`."""
        return precision_here(self.block.precision)

    @cached_property
    def key(self) -> str:
        """16 hex digits of all that the weights depend on: settings, code, seed, precision, bytes
        of the data and of the weights it starts from. The name of the run is not among them."""
        start = read_json(self.init)
        parts = [start.get("sha256"), start.get("vision_feature_layer")]  # of a backbone manifest
        return sha256_json(
            {
                "stage": self.stage,
                "settings": self.block.identity(),
                "code": follows.code(*follows.training(self.block, self.config.model.family)),
                "precision": self.precision,
                "attention": attention_here(self.block.precision),
                "seed": self.seed,
                "data": [read_json(manifest)["sha256"] for manifest in self.data],
                "init": start.get("weights_sha256") or parts,
            }
        )[:16]

    @property
    def folder(self) -> Path:
        """Where the weights lie, for all runs that ask for the same."""
        return self.out.parents[3] / "weights" / self.key

    @property
    def tokens(self) -> Path:
        """Folder of tokens, which all trainings share that have the same data and processor."""
        return self.out.parents[3] / "tokens"

    def seed_of(self, purpose: str) -> int:
        """The seed of what this stage draws for one purpose."""
        return derived_seed(self.seed, f"{self.stage}/{purpose}")


def derived_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose (31 bits): no purpose moves the random numbers of another."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:4]) >> 1
