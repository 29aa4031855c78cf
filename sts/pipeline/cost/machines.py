"""GPUs that a run can be estimated for without having them."""

from typing import NamedTuple

# Share of the peak that a training of LLaVA-1.5-7B reached on 8 A100 by its published hours (3.5 h
# and 10 h, LLaVA's README) and our FLOPs: 0.42 in align, 0.32 in instruct. Of its bandwidth
# a guess: answers are decoded by many small kernels
SHARE = 0.35
CORES_BANDWIDTH = 5e9  # bytes a second that a few cores of a slow processor read


class Gpu(NamedTuple):
    """By the data sheet: dense bf16 products a second, bytes of memory, bytes of it a second."""

    flops: float
    memory: float
    bandwidth: float


GPUS = {
    "a100-40": Gpu(312e12, 40e9, 1.555e12),
    "a100": Gpu(312e12, 80e9, 2.039e12),
    "h100": Gpu(989e12, 80e9, 3.35e12),
    "h200": Gpu(989e12, 141e9, 4.8e12),
    "l40s": Gpu(362e12, 48e9, 0.864e12),
    "rtx4090": Gpu(165e12, 24e9, 1.008e12),
}


def gpu_of(device: str) -> Gpu | None:
    """A device by its name; None: it is not in GPUS."""
    name = device.lower().replace(" ", "")  # it may be "NVIDIA GeForce RTX 4090"
    return next((gpu for kind, gpu in GPUS.items() if kind in name), None)


class Machine(NamedTuple):
    """So many GPUs of a kind, and what an hour of one costs, in whatever money."""

    kind: str
    count: int
    price: float | None = None

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.kind]
