"""Sparse Training Scheme: cheaper training of multimodal LLMs, unchanged inference.

    from sts import STS_LDS, STS_VTC, sparsify

    scheme = sparsify(model, STS_VTC, STS_LDS, total_steps=1000)
    for step, batch in enumerate(batches):
        scheme.begin_step(step)
        model(**batch).loss.backward()

In a `transformers` Trainer: `Trainer(model, ..., callbacks=[SparseCallback(model, STS_VTC)])`.
Names load on first use, so `import sts.pipeline.config` costs no torch import.
"""

from importlib import import_module, metadata

_HOMES = {
    "LDS": "sts.settings",
    "STS_LDS": "sts.settings",
    "STS_VTC": "sts.settings",
    "VTC": "sts.settings",
    "SparseCallback": "sts.callback",
    "sparsify": "sts.scheme",
    "unsparsify": "sts.scheme",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "__version__":
        try:
            return metadata.version("sparse-training-scheme")
        except metadata.PackageNotFoundError:
            return "0+unknown"  # a checkout, which is not installed
    raise AttributeError(f"module 'sts' has no attribute {name!r}")
