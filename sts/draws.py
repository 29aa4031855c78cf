"""Random generators that depend on a key alone, so that a draw moves no other random stream."""

import random
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def keyed_generator(*key: object) -> random.Random:
    """A generator that depends on its key alone (Python seeds it with the key's SHA-512).

    Of its methods only `.random()` is promised to stay the same over Python versions.
    """
    return random.Random("/".join(map(str, key)))


def keyed_seed(*key: object) -> int:
    """A seed of 53 bits that depends on its key alone."""
    return int(keyed_generator(*key).random() * 2**53)


def digest(tensor: "torch.Tensor") -> str:
    """A hash of a tensor's shape and values, for a key. Waits for the tensor's device."""
    import torch

    values = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return sha256(repr(tuple(tensor.shape)).encode() + values).hexdigest()


def keyed_torch_generator(*key: object) -> "torch.Generator":
    """The same for tensors; on the CPU, so that it draws the same for every device."""
    import torch  # inside: decisions are read where there is no torch

    return torch.Generator().manual_seed(keyed_seed(*key))
