"""Prepared data as batches: tokens made once, all of it mapped, images decoded when asked for.

The t-th batch is a function of the data, the seed and t alone: a resumed training asks for the next
one and needs no sampler state.
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset as Table
from datasets import concatenate_datasets
from filelock import FileLock
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import BatchFeature, ProcessorMixin

from sts.pipeline.data.pictures import check_origins, load_images, stored_size
from sts.pipeline.data.rows import images_of
from sts.pipeline.data.tokens import OF_TOKENS, Size, cut, expand, tokenise
from sts.pipeline.files import (
    SpoiltError,
    hashes,
    listed_file,
    read_json,
    spoilt,
    write_json_atomic,
)
from sts.settings import IGNORE_INDEX

CHUNK = 1000  # conversations tokenised at a time
IMAGES = ("id", "image", "images", "origins")  # columns that images are read with
TOKENS = pa.schema({
    "ids": pa.list_(pa.int32()), "repeats": pa.list_(pa.int32()), "is_answer": pa.list_(pa.bool_()),
    "row": pa.int32(), "length": pa.int32(), "has_image": pa.bool_(),
})  # fmt: skip
TYPE_IDS = frozenset({"mm_token_type_ids", "token_type_ids"})  # 1 on placeholders of images

log = logging.getLogger(__name__)


def split_files(manifests: Sequence[str | Path], split: str) -> list[Path]:
    """The Arrow file of a split in each data manifest. Raises SpoiltError if one is not as it was
    written, ValueError if a data set has no such split."""
    files = []
    for manifest in map(Path, manifests):
        content = read_json(manifest)
        if split not in content["splits"]:
            raise ValueError(
                f"{manifest}: data set {content['dataset']} has no split {split!r}; it has: "
                f"{', '.join(content['splits'])}. Take it out of {split}.data"
            )
        files.append(listed_file(manifest, content["splits"][split]["file"]))
    return files


class Conversations(Dataset):
    """The rows of Arrow files as samples for `collate`; neither they nor their tokens are read into
    memory.

    Samples longer than `max_length` tokens are cut; rows that then have no answer left are dropped,
    with a warning.

    Args:
        files: Arrow files of prepared splits.
        processor: of the model.
        max_length: tokens of a sample, the placeholders of its images included.
        tokens: file that holds, or gets, what the processor makes of these rows; processes that
            ask for it at once wait for the first.
        template: as in `tokenise`.

    Raises:
        ValueError: `max_length` doesn't hold a row's images.
        DataError: An image file is not the one that was prepared; also when a sample is read.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        processor: ProcessorMixin,
        max_length: int,
        tokens: Path,
        template: str | None = None,
    ):
        rows = concatenate_datasets([Table.from_file(str(file)) for file in files])
        tokens.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(tokens.with_suffix(".lock")):
            if not _is_whole(tokens):
                part = tokens.with_suffix(".part")
                _write_tokens(rows, processor, max_length, template, part)
                part.replace(tokens)
                write_json_atomic(tokens.with_suffix(".json"), hashes(tokens.parent, [tokens]))
        self.samples = pa.ipc.open_file(pa.memory_map(str(tokens))).read_all()
        self.lengths = self.samples["length"].to_pylist()
        self.has_image = self.samples["has_image"].to_pylist()
        if dropped := len(rows) - len(self):
            text = "%d of %d rows dropped: no answer within max_length %d"
            log.warning(text, dropped, len(rows), max_length)
        columns = [name for name in IMAGES if name in rows.column_names]
        self.images = rows.select_columns(columns).with_format("arrow")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        """{"input_ids", "labels": int32 [tokens], "images": PIL images in their order}."""
        cells = {name: self.samples[name][index].values for name in OF_TOKENS}
        ids, labels = expand({name: cells[name].to_numpy(False) for name in OF_TOKENS})
        row = self.samples["row"][index].as_py()
        images = load_images(self.images[row].to_pylist()[0])
        return {"input_ids": ids, "labels": labels, "images": images}


def _is_whole(tokens: Path) -> bool:
    """Whether a file of tokens is there as it was written."""
    try:
        return not spoilt(tokens.parent, read_json(tokens.with_suffix(".json")))
    except (OSError, SpoiltError):
        return False


def _write_tokens(
    rows: Table, processor: ProcessorMixin, max_length: int, template: str | None, file: Path
) -> None:
    """Write what the processor makes of the texts and of the sizes of the images, as TOKENS."""
    encoded = rows.with_format("arrow")  # images as they are stored: not decoded for their size
    with pa.ipc.new_file(file, TOKENS) as writer:
        for start in tqdm(range(0, len(rows), CHUNK), "tokenise", unit="k rows", disable=None):
            chunk = encoded[start : start + CHUNK]
            images = chunk.select([name for name in IMAGES if name in chunk.column_names])
            # one row at a time: all encoded images of a chunk may be large
            cells = (images.slice(row, 1).to_pylist()[0] for row in range(len(chunk)))
            sizes = [_sizes(of_row) for of_row in cells]
            samples = _tokenised(processor, chunk, sizes, template)
            kept = []
            for place, (sample, of_row) in enumerate(zip(samples, sizes, strict=True)):
                if sample["images_end"] > max_length:
                    raise ValueError(
                        f"max_length {max_length} doesn't hold the {sample['images_end']} tokens "
                        f"up to the end of the images of row {chunk['id'][place]} (height x width: "
                        f"{', '.join(f'{h} x {w}' for h, w in of_row)}): raise it"
                    )
                sample = cut(sample, max_length)
                if sample["is_answer"].any():
                    facts = {"row": start + place, "length": int(sample["repeats"].sum())}
                    kept.append(sample | facts | {"has_image": bool(of_row)})
            writer.write_batch(pa.RecordBatch.from_pylist(kept, schema=TOKENS))


def _tokenised(
    processor: ProcessorMixin, chunk: Table, sizes: list[list[Size]], template: str | None
) -> list[dict]:
    """`tokenise` of rows. Raises ValueError with the id of the first that the processor refuses."""
    texts = chunk["conversations"].to_pylist()
    try:
        return tokenise(processor, texts, sizes, template)
    except Exception:  # whatever a processor raises
        for id, text, of_row in zip(chunk["id"].to_pylist(), texts, sizes, strict=True):
            try:
                tokenise(processor, [text], [of_row], template)
            except Exception as error:
                raise ValueError(f"row {id} can't be tokenised: {error}") from error
        raise


def _sizes(row: dict) -> list[Size]:
    check_origins(row)
    return [stored_size(cell) for cell in images_of(row)]


def collate(processor: ProcessorMixin, samples: Sequence[dict]) -> BatchFeature:
    """Samples of `Conversations` as one batch, padded on the right.

    Returns input_ids, attention_mask and labels, long [batch, tokens], the types of tokens if the
    model asks for them, and, if any sample has an image, what the processor makes of the images in
    the order of the samples (pixel_values, image_sizes, image_grid_thw, ...).
    """
    pad = processor.tokenizer.pad_token_id or 0  # without a pad token any id does: it is masked

    def stack(rows: Sequence[np.ndarray], filler: int) -> torch.Tensor:
        tensors = [torch.from_numpy(row).long() for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=filler)

    ids = [sample["input_ids"] for sample in samples]
    batch = {
        "input_ids": stack(ids, pad),
        "attention_mask": stack([np.ones_like(row) for row in ids], 0),
        "labels": stack([sample["labels"] for sample in samples], IGNORE_INDEX),
    }
    names = processor.model_input_names
    for name in TYPE_IDS.intersection(names) if processor.return_mm_token_type_ids else ():
        types = processor.create_mm_token_type_ids([row.tolist() for row in ids])
        batch[name] = stack([np.array(row) for row in types], 0)
    if images := [sample["images"] for sample in samples if sample["images"]]:
        # the rest of the processor's call makes text, which takes as long again
        options = processor._merge_kwargs(return_tensors="pt")["images_kwargs"]
        tensors, _ = processor._process_images(images, **options)
        batch |= {name: tensors[name] for name in tensors if name in names}
    return BatchFeature(batch)


def example(samples: Conversations, processor: ProcessorMixin) -> BatchFeature:
    """The first sample with an image, or of all if none has one, as a batch."""
    index = samples.has_image.index(True) if any(samples.has_image) else 0
    return collate(processor, [samples[index]])


def batch_order(
    lengths: Sequence[int], has_image: Sequence[bool], batch_size: int, seed: int, **grouping: Any
) -> Callable[[int], list[int]]:
    """The function step -> indices of that step's batch, over as many epochs as are asked for;
    `grouping` as in `batch_indices`. Raises ValueError if there are no samples."""
    if not len(lengths):
        raise ValueError("no samples to make batches of")
    of_epoch = lru_cache(maxsize=2)(
        partial(batch_indices, lengths, has_image, batch_size, seed, **grouping)
    )
    size = len(of_epoch(0))  # the same in every epoch
    return lambda step: of_epoch(step // size)[step % size]


def batch_indices(
    lengths: Sequence[int],
    has_image: Sequence[bool],
    batch_size: int,
    seed: int,
    epoch: int,
    group_by_length: bool = True,
    sorted_batches: int = 50,
) -> list[list[int]]:
    """The batches of one epoch: every sample once, in an order given by (seed, epoch).

    Grouped, a batch holds samples that all have an image or all have none; what doesn't fill a
    batch of its kind is put together. So many batches' samples are sorted by length before they are
    dealt out: with 50 a batch is of similar lengths, as transformers groups them; with 1 it is a
    random one of its kind, as by LLaVA's `group_by_modality_length`, with the longest first. All
    batches are full but one, which stands anywhere, if batch_size doesn't divide the samples.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    if not group_by_length:
        return [part.tolist() for part in _chunks(order, batch_size)]
    lengths, has_image = np.asarray(lengths), np.asarray(has_image, bool)
    full, rest = [], []
    for kind in (order[has_image[order]], order[~has_image[order]]):
        for block in _chunks(kind, sorted_batches * batch_size):
            block = block[np.argsort(-lengths[block], kind="stable")]
            full += _chunks(block, batch_size)
        if full and len(full[-1]) < batch_size:
            rest.append(full.pop())
    batches = full + (_chunks(np.concatenate(rest), batch_size) if rest else [])
    return [batches[i].tolist() for i in rng.permutation(len(batches))]


def _chunks(items: np.ndarray, size: int) -> list[np.ndarray]:
    return [items[start : start + size] for start in range(0, len(items), size)]
