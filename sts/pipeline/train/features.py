"""What a frozen vision tower gives the projector: computed once, read by every training that leaves
the tower as it is (`model.features: cached`).

    python -m sts features --config results/mini/configs/dense.yaml --stage align \
        --data data/mini/scenes/manifest.json --init results/mini/backbone/dense.json \
        --out results/mini/features/dense/scenes-align.json

The bytes lie beside `out` in an Arrow file that is mapped, not read: a row for each row of the
split, a column for each module of the projector that reads the tower, null where there is no image.
The values have the number format and the rounding that the tower gives them in a training.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset as Table
from torch import Tensor, nn
from transformers import BatchFeature, PreTrainedModel

from sts.architectures import projector_of, tower_layers_of
from sts.pipeline.config import Config, StageConfig
from sts.pipeline.data.collator import made_once, pixels, split_files
from sts.pipeline.data.rows import images_of
from sts.pipeline.files import read_json, sha256_json, write_json_atomic
from sts.pipeline.run import follows
from sts.pipeline.run.bar import bar_of
from sts.pipeline.run.device import precision_here
from sts.pipeline.train.model import build, freeze
from sts.pipeline.train.step import prepare_process
from sts.vtc import wants

KEY = "features/"  # what the projector's modules get stands in a batch under this and their names
SHAPE = "/shape"  # in the name of the column with the shapes of another
TOGETHER = 32  # pictures of one size that go through the tower at once


def asks_tower(block: StageConfig) -> bool:
    """Whether a stage's VTC wants to know how the vision tower's class token attends."""
    return block.compresses and "scores" in wants(block.vtc.kind)


def usable(
    block: StageConfig, data: Sequence[str | Path], features: Sequence[str | Path]
) -> list[Path]:
    """The files of `features` that a stage trains on, one for each of its data sets `data` (all are
    manifests). Empty if its VTC asks how the tower's class token attends, which no file says, or if
    they were computed in another precision than the stage's.

    Raises ValueError if there is none for a data set.
    """
    if not features or asks_tower(block):
        return []
    described = {file: read_json(file) for file in map(Path, features)}
    found = []
    for manifest in data:
        own = {"data": read_json(manifest)["sha256"], "split": block.split}
        fit = [file for file, one in described.items() if own.items() <= one.items()]
        if not fit:
            raise ValueError(
                f"features: none of {manifest}, {block.split}, among {list(described)}"
            )
        found.append(fit[0])
    same = all(described[file]["precision"] == precision_here(block.precision) for file in found)
    return found if same else []


def skip_tower(model: PreTrainedModel) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """From now on the layers of the tower do nothing, and the projector's modules are called with
    what the batch holds for them (KEY + name). Returns that of the latest forward pass, and the
    function that undoes it."""
    given: dict[str, Tensor] = {}

    def keep(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given.clear()
        given.update({key: kwargs.pop(key) for key in list(kwargs) if key.startswith(KEY)})
        return args, kwargs

    def give(name: str, _: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (given[KEY + name], *args[1:]), kwargs
        first, *_ = kwargs
        return args, kwargs | {first: given[KEY + name]}

    hooks = [model.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)]
    for name, module in projector_of(model).items():
        hooks.append(module.register_forward_pre_hook(partial(give, name), with_kwargs=True))
    skipped = tower_layers_of(model)
    for layer in skipped:
        layer.forward = _as_it_is

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        for layer in skipped:
            del layer.forward

    return given, undo


def _as_it_is(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


def seen_by_projector(
    model: PreTrainedModel, inputs: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Name -> what each module of the projector is called with, [rows, ..., dim], for images as the
    image processor gives them; and the embeddings that the model makes of them.

    Raises NotCached for a module that is not called once.
    """
    modules = projector_of(model)
    calls: dict[str, list[Tensor]] = {name: [] for name in modules}

    def see(name: str, _: nn.Module, args: tuple, kwargs: dict) -> None:
        first, *others = [*args, *kwargs.values()]
        if any(map(_may_be_features, others)):
            raise _refusal(model, f"calls {name} with more than one tensor")
        calls[name].append(first)

    hooks = [
        module.register_forward_pre_hook(partial(see, name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        made = _embedded(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for name, tensors in calls.items():
        if len(tensors) != 1:
            raise _refusal(model, f"calls {name} {len(tensors)} times for the images of a batch")
    return {name: tensors[0] for name, tensors in calls.items()}, made


def _may_be_features(value: Any) -> bool:
    """Whole numbers and masks are not: they tell of the images' sizes."""
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return floats or isinstance(value, list | tuple)


def _embedded(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Tensor]:
    if not hasattr(model, "get_image_features"):
        raise _refusal(model, "has no get_image_features")
    inner = getattr(model, "model", model)  # whose signature names what the outer one hands on
    ways = [one.get_image_features for one in (model, inner) if hasattr(one, "get_image_features")]
    known = {name for way in ways for name in signature(way).parameters}
    found = model.get_image_features(**{k: v for k, v in inputs.items() if k in known})
    found = getattr(found, "pooler_output", found)
    return [found] if isinstance(found, Tensor) else list(found)


class NotCached(ValueError):
    """What a model's vision tower gives can't be kept; the text says what is accepted."""


def _refusal(model: PreTrainedModel, why: str) -> NotCached:
    return NotCached(f"live: {type(model).__name__} {why}")


def write_features(
    config: Config, stage: str, data: str | Path, init: str | Path, out: str | Path
) -> dict[str, Any]:
    """Send the pictures of one prepared data set through the tower; write and return the manifest.

    stage: whose split, precision and threads count. data, init: the manifests of the data set and
    of the model that training starts from. Raises NotCached for a model whose features can't be
    kept.
    """
    block, out = config.stage(stage), Path(out)
    prepared = read_json(data)
    manifest = {
        "dataset": prepared["dataset"],
        "split": block.split,
        "data": prepared["sha256"],
        "model": read_json(init)["sha256"],
        "precision": precision_here(block.precision),
    }
    code = follows.code(*follows.features())
    file = out.parent / f"{sha256_json([manifest, code])[:16]}.arrow"
    with made_once(file) as part:
        if part:
            accelerator = prepare_process(block.model_copy(update={"processes": 1}))
            model, processor = build(init, 0)
            freeze(model.to(accelerator.device), ["projector"])
            with torch.autocast(
                accelerator.device.type, torch.bfloat16, enabled=manifest["precision"] == "bf16"
            ):
                _write(model, processor, split_files([data], block.split)[0], part)
    manifest |= {"file": str(file), "bytes": file.stat().st_size}
    write_json_atomic(out, manifest)
    return manifest


def _write(model: PreTrainedModel, processor: Any, pictures: Path, part: Path) -> None:
    rows = Table.from_file(str(pictures)).remove_columns("conversations")
    names, checked = list(projector_of(model)), False
    fields = [(name, pa.large_binary()) for name in names]
    fields += [(f"{name}{SHAPE}", pa.list_(pa.int32())) for name in names]
    schema = pa.schema([*fields, ("dtype", pa.string())])
    bar = bar_of(f"features {pictures.stem}", 0, len(rows))
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for images in _alike(rows):
            columns: dict[str, list] = {name: [None] * len(images) for name in schema.names}
            if images[0]:
                inputs = BatchFeature(pixels(processor, images)).to(model.device)
                if not checked:
                    check(model, inputs)
                    checked = True
                with torch.no_grad():
                    found, _ = seen_by_projector(model, inputs)
                for name, tensor in found.items():
                    each = tensor.cpu().unflatten(0, (len(images), -1))
                    columns[name] = [_bytes(one) for one in each]
                    columns[name + SHAPE] = [list(one.shape) for one in each]
                columns["dtype"] = [str(tensor.dtype).removeprefix("torch.")] * len(images)
            writer.write_batch(pa.record_batch([columns[n] for n in schema.names], schema=schema))
            bar.update(len(images))
    bar.close()


def _alike(rows: Table) -> Iterator[list[list]]:
    """The images of each row, in runs of rows whose images have the same sizes."""
    for _, run in groupby(
        map(images_of, rows), key=lambda images: [image.size for image in images]
    ):
        while some := list(islice(run, TOGETHER)):
            yield some


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def check(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Raise NotCached if the projector makes something else, or learns something else, of what was
    kept than of the images, as where one of its modules reads what another one made. Its parameters
    must ask for gradients."""

    def learnt(made: Sequence[Tensor]) -> list[Tensor]:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss = sum(tensor.float().pow(2).sum() for tensor in made)
        return list(torch.autograd.grad(loss, parameters, materialize_grads=True))

    try:
        found, made = seen_by_projector(model, inputs)
        grads = learnt(made)
        given, undo = skip_tower(model)
        given.update({KEY + name: tensor.detach() for name, tensor in found.items()})
        again = _embedded(model, inputs)
        same = all(map(torch.equal, [*made, *grads], [*again, *learnt(again)]))
        undo()
    except NotCached:
        raise
    except Exception as error:  # whatever a model does with layers that do nothing
        raise _refusal(model, f"can't skip its vision tower ({error})") from error
    if not same:
        raise _refusal(model, "makes something else of its image features than of the images")


def reader_of(manifests: Sequence[str | Path]) -> Callable[[int], dict[str, Tensor]]:
    """The function from a row of the data sets, one after the other, to KEY + name -> what a module
    of the projector is called with, [rows, ..., dim]; nothing for a row without an image."""
    files = [pa.memory_map(read_json(manifest)["file"]) for manifest in manifests]
    table = pa.concat_tables(pa.ipc.open_file(file).read_all() for file in files)
    names = [name.removesuffix(SHAPE) for name in table.column_names if name.endswith(SHAPE)]

    def tensor(name: str, row: int, kind: str) -> Tensor:
        held = np.frombuffer(table[name][row].as_buffer(), np.uint8)
        shape = table[name + SHAPE][row].as_py()
        return torch.from_numpy(held.copy()).view(getattr(torch, kind)).view(shape)

    def read(row: int) -> dict[str, Tensor]:
        kind = table["dtype"][row].as_py()
        return {KEY + name: tensor(name, row, kind) for name in names} if kind else {}

    return read
