"""Asking a checkpoint: lm-eval's `hf-multimodal`, as the model was trained, in pieces that fit into
memory."""

import copy
import gc
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.api.task
import lm_eval.evaluator
import torch
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.models.hf_vlms import HFMultimodalLM
from tqdm import tqdm

from sts.pipeline.data.conversation import content_of, end_token, render
from sts.pipeline.data.pictures import rgb

AT_ONCE = 2048  # questions whose pictures are in memory together
BLIND = "_blind"  # ends the name of a benchmark's twin with grey images

Id = tuple[str, str]  # a benchmark's name and that of a task of it


def load_model(
    weights: str | Path, batch_size: int, threads: int, trust_remote_code: bool = False
) -> LM:
    """The checkpoint as lm-eval's `hf-multimodal`, on the GPU if there is one."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return _Model(
        pretrained=str(weights),
        device=device,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
    )


class _Model(HFMultimodalLM):
    """Asks as the model was trained, with images of any mode, until its own end of a turn; refuses
    a question that is too long: lm-eval cuts off its beginning, the image with it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        ends, end = self.model.generation_config.eos_token_id, end_token(self.processor)
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        if end is not None and end not in ends:
            self.model.generation_config.eos_token_id = [*ends, end]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        self.chat_applied = True
        chat = [(message["role"], content_of(message["content"])) for message in chat_history]
        if add_generation_prompt:
            return render(self.processor, chat, ask=True)
        return render(self.processor, chat[:-1], ask=True) + chat_history[-1]["content"]

    def tok_batch_multimodal_encode(
        self, strings: list[str], images: list, left_truncate_len: int | None = None, **options: Any
    ) -> Mapping[str, torch.Tensor]:
        images = [[rgb(image) for image in of_question] for of_question in images]
        encoded = super().tok_batch_multimodal_encode(strings, images, **options)
        length, room = encoded["input_ids"].shape[1], left_truncate_len
        if room is not None and length > room:
            raise ValueError(
                f"a question of {length} tokens and an answer of up to {self.max_length - room} "
                f"don't fit into the {self.max_length} tokens that the model takes: "
                f"{max(strings, key=len)[:80]!r}...; take its benchmark out of evaluate.benchmarks"
            )
        return encoded


def ask(
    lm: LM, tasks: Mapping[Id, Task], places: Sequence[tuple[Id, int]]
) -> Iterator[tuple[Id, dict[str, Any]]]:
    """(task, lm-eval's sample) of every question at these places, task by task. At most AT_ONCE are
    asked together: lm-eval holds the decoded picture of each that it is given."""
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # else a bar for each task's prompts
    lm_eval.evaluator.LMEVAL_HASHMM = False  # else every image is written as PNG four times
    direct = {id: _direct(tasks[id]) for id in dict.fromkeys(id for id, _ in places)}
    for start in range(0, len(places), AT_ONCE):
        piece = defaultdict(list)
        for id, place in places[start : start + AT_ONCE]:
            piece[id].append(place)
        gc.freeze()  # `hf-multimodal` collects garbage after every batch: half the time otherwise
        try:
            samples = lm_eval.evaluate(
                lm=lm,
                task_dict={"tasks": {id: direct[id] for id in piece}},
                samples=dict(piece),
                apply_chat_template=True,
                bootstrap_iters=0,
            )["samples"]
        finally:
            gc.unfreeze()
        for id in piece:
            direct[id]._instances = None  # the pictures
            yield from ((id, sample) for sample in samples[id])


def _direct(task: Task) -> Task:
    """The same task, which looks up only the questions at the places that it is given: lm-eval
    decodes all that there are, twice, and looks for each in the list of places."""
    twin, docs = copy.copy(task), task.eval_docs
    twin.doc_iterator = lambda *, samples, **_: enumerate(docs[place] for place in samples)
    return twin


def draw_places(tasks: Mapping[Id, Task], limit: int | None, grey: float) -> list[tuple[Id, int]]:
    """Where the questions are that are asked: of a benchmark `limit` (None: all), of its blind twin
    the share `grey` of them. Those that are scored together (`metadata.group` of a task file) are
    asked together: as many groups as the number holds, and one at least. They are the first of an
    order that a fixed seed gives, so fewer are a part of more."""
    questions = defaultdict(list)
    for id, task in tasks.items():
        group_of = (task.config.metadata or {}).get("group") or (lambda docs: range(len(docs)))
        groups = enumerate(group_of(task.eval_docs))
        questions[id[0]] += [((id, place), (id, group)) for place, group in groups]
    places = []
    for name, of_benchmark in questions.items():
        count = len(of_benchmark)
        most = min(limit or count, count)
        most = math.ceil(most * grey) if name.endswith(BLIND) else most
        sizes = Counter(group for _, group in of_benchmark)
        order = random.Random(len(sizes)).sample([*sizes], len(sizes))
        ends = accumulate(sizes[group] for group in order)
        drawn = {group for group, end in zip(order, ends, strict=True) if end <= most} or {order[0]}
        places += [place for place, group in of_benchmark if group in drawn]
    return places
