"""Prepared data as batches: tokens in memory, images decoded when asked for, a seeded order.

    data = Conversations(split_files(manifests, "instruct"), processor, max_length=2048)
    order = batch_order(data.lengths, data.has_image, batch_size=32, seed=0)
    batches = [order(t) for t in range(first, last)]
    DataLoader(data, batch_sampler=batches, collate_fn=partial(collate, processor))

The t-th batch is a function of the data, the seed and t alone: a resumed training asks for the next
one and needs no sampler state.
"""

import json
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset as Table
from datasets import concatenate_datasets
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import BatchFeature, ProcessorMixin

from sts.pipeline.data.conversation import expand, image_id, image_tokens, tokenise
from sts.settings import IGNORE_INDEX

CHUNK = 1000  # conversations tokenised at a time
MEGABATCH = 50  # batches within which samples are sorted by length, as in LLaVA

log = logging.getLogger(__name__)


def split_files(manifests: Sequence[str | Path], split: str) -> list[Path]:
    """The Parquet file of a split in each data manifest.

    Raises ValueError if a manifest's data set has no such split.
    """
    files = []
    for manifest in map(Path, manifests):
        content = json.loads(manifest.read_text(encoding="utf-8"))
        if split not in content["splits"]:
            raise ValueError(
                f"{manifest}: data set {content['dataset']} has no split {split!r}; it has: "
                f"{', '.join(content['splits'])}. Take it out of {split}.data"
            )
        files.append(manifest.parent / content["splits"][split]["file"])
    return files


class Conversations(Dataset):
    """The rows of Parquet files as samples for `collate`.

    Tokens longer than `max_length` are cut; rows that then have no answer left are dropped, with a
    warning. Raises ValueError if `max_length` doesn't hold a row's image.

    lengths    tokens of each sample, the image's placeholders included
    has_image  whether each sample has an image
    """

    def __init__(self, files: Sequence[str | Path], processor: ProcessorMixin, max_length: int):
        # Read into memory; `load_dataset` would copy the files to a cache of its own first.
        rows = concatenate_datasets([Table(pq.read_table(file)) for file in files])
        self.image_id, self.image_tokens = image_id(processor), image_tokens(processor)
        self.samples, self.lengths, self.has_image, kept = [], [], [], []
        chunks = range(0, len(rows), CHUNK)
        for start in tqdm(chunks, "tokenise", unit="k rows", disable=None):
            chunk = rows.select_columns("conversations")[start : start + CHUNK]["conversations"]
            for row, (ids, labels) in enumerate(tokenise(processor, chunk), start):
                has_image = bool((ids == self.image_id).any())
                room = max_length - has_image * (self.image_tokens - 1)
                ids, labels = ids[: max(room, 0)], labels[: max(room, 0)]
                if has_image and not (ids == self.image_id).any():
                    raise ValueError(
                        f"max_length {max_length} doesn't hold the {self.image_tokens} tokens of "
                        "an image: raise it"
                    )
                if (labels == IGNORE_INDEX).all():
                    continue
                self.samples.append((ids, labels))
                self.lengths.append(len(ids) + has_image * (self.image_tokens - 1))
                self.has_image.append(has_image)
                kept.append(row)
        if len(kept) < len(rows):
            log.warning(
                "%d of %d rows dropped: no answer within max_length %d",
                len(rows) - len(kept), len(rows), max_length,
            )  # fmt: skip
        self.images = rows.select_columns("image").select(kept)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        """{"input_ids", "labels": int32 [tokens], "image": PIL image or None}."""
        ids, labels = expand(*self.samples[index], self.image_id, self.image_tokens)
        return {"input_ids": ids, "labels": labels, "image": self.images[index]["image"]}


def collate(processor: ProcessorMixin, samples: Sequence[dict]) -> BatchFeature:
    """Samples of `Conversations` as one batch, padded on the right.

    Returns input_ids, attention_mask and labels, long [batch, tokens], and, if any sample has an
    image, pixel_values [images, 3, height, width] in the order of the samples that have one.
    """
    pad = processor.tokenizer.pad_token_id or 0  # without a pad token any id does: it is masked

    def stack(rows: list[np.ndarray], filler: int) -> torch.Tensor:
        tensors = [torch.from_numpy(row).long() for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=filler)

    ids = [sample["input_ids"] for sample in samples]
    batch = {
        "input_ids": stack(ids, pad),
        "attention_mask": stack([np.ones_like(row) for row in ids], 0),
        "labels": stack([sample["labels"] for sample in samples], IGNORE_INDEX),
    }
    images = [sample["image"] for sample in samples if sample["image"] is not None]
    if images:
        pixels = processor.image_processor(images=images, return_tensors="pt")
        batch["pixel_values"] = pixels["pixel_values"]
    return BatchFeature(batch)


def batch_order(
    lengths: Sequence[int],
    has_image: Sequence[bool],
    batch_size: int,
    seed: int,
    group_by_length: bool = True,
) -> Callable[[int], list[int]]:
    """The function step -> indices of that step's batch, over as many epochs as are asked for.

    Raises ValueError if there are no samples.
    """
    if not len(lengths):
        raise ValueError("no samples to make batches of")

    @lru_cache(maxsize=2)
    def epoch(number: int) -> list[list[int]]:
        return batch_indices(lengths, has_image, batch_size, seed, number, group_by_length)

    size = len(epoch(0))  # the same in every epoch
    return lambda step: epoch(step // size)[step % size]


def batch_indices(
    lengths: Sequence[int],
    has_image: Sequence[bool],
    batch_size: int,
    seed: int,
    epoch: int,
    group_by_length: bool = True,
) -> list[list[int]]:
    """The batches of one epoch: every sample once, in an order given by (seed, epoch).

    Grouped (as LLaVA's `group_by_modality_length`), a batch holds samples of similar length that
    all have an image or all have none; what doesn't fill a batch of its kind is put together. All
    batches are full but one, which stands anywhere, if batch_size doesn't divide the samples.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    if not group_by_length:
        return [part.tolist() for part in _chunks(order, batch_size)]
    lengths, has_image = np.asarray(lengths), np.asarray(has_image, bool)
    full, rest = [], []
    for kind in (order[has_image[order]], order[~has_image[order]]):
        for block in _chunks(kind, MEGABATCH * batch_size):
            block = block[np.argsort(-lengths[block], kind="stable")]
            full += _chunks(block, batch_size)
        if full and len(full[-1]) < batch_size:
            rest.append(full.pop())
    batches = full + (_chunks(np.concatenate(rest), batch_size) if rest else [])
    return [batches[i].tolist() for i in rng.permutation(len(batches))]


def _chunks(items: np.ndarray, size: int) -> list[np.ndarray]:
    return [items[start : start + size] for start in range(0, len(items), size)]
