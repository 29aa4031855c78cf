"""GPUs that a run can be estimated for without having them."""

from typing import NamedTuple

# Share of the peak that a training of LLaVA-1.5-7B reached on 8 A100 by its published hours (3.5 h
# and 10 h, LLaVA's README) and our FLOPs: 0.42 in align, 0.32 in instruct
SHARE = 0.35


class Gpu(NamedTuple):
    """flops: dense bf16 products a second, by the data sheet. memory: bytes."""

    flops: float
    memory: float


GPUS = {
    "a100-40": Gpu(312e12, 40e9),
    "a100": Gpu(312e12, 80e9),
    "h100": Gpu(989e12, 80e9),
    "h200": Gpu(989e12, 141e9),
    "l40s": Gpu(362e12, 48e9),
    "rtx4090": Gpu(165e12, 24e9),
}


def peak_flops(device: str) -> float | None:
    """Dense bf16 products a second of a device by its name; None: it is not in GPUS."""
    name = device.lower().replace(" ", "")  # it may be "NVIDIA GeForce RTX 4090"
    return next((gpu.flops for kind, gpu in GPUS.items() if kind in name), None)


class Machine(NamedTuple):
    """So many GPUs of a kind, and what an hour of one costs, in whatever money."""

    kind: str
    count: int
    price: float | None = None

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.kind]
