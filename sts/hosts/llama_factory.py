"""STS in LLaMA-Factory, whose command line takes no callbacks: this one is its `train` with `sts`.

    torchrun --nproc-per-node 2 -m sts.hosts.llama_factory train.yaml [key=value ...]

The YAML is LLaMA-Factory's, with a key `sts` more: {vtc: {kind: random, keep: 0.5}, lds: ...}.
"""

from llamafactory.hparams import read_args
from llamafactory.train.tuner import run_exp

from sts.checks import expect
from sts.hosts import callback_of


def main() -> None:
    """Train by the YAML or JSON file that the command line names.

    Raises:
        ValueError: The file has no key `sts`, or it is wrong.
    """
    arguments = read_args()
    accepted = "first argument a YAML or JSON file with a key `sts` (vtc, lds, seed)"
    is_file = isinstance(arguments, dict) and "sts" in arguments
    expect(is_file, "command line", arguments, accepted)
    callback = callback_of(arguments.pop("sts"))
    run_exp(arguments, callbacks=[callback])


if __name__ == "__main__":
    main()
