"""Asking a checkpoint: lm-eval's `hf-multimodal`, as the model was trained, in batches of as many
tokens as fit into memory.

Questions are asked in pieces, whose pictures are in memory together. A piece belongs to one process
and its batches follow from its questions alone. So whoever asks them, and whatever was kept of an
interrupted call, an answer is that of the same batch. Answers are kept as they come, a batch at a
time.
"""

import copy
import gc
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import lm_eval.api.task
import lm_eval.evaluator
import torch
from accelerate import PartialState
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.models.hf_vlms import HFMultimodalLM
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, set_seed

from sts.pipeline.config import Config
from sts.pipeline.cost.memory import check_evaluation
from sts.pipeline.data.conversation import content_of, end_token, render
from sts.pipeline.data.pictures import rgb
from sts.pipeline.data.tokens import length

AT_ONCE = 512  # questions whose pictures are in memory together
BLIND = "_blind"  # ends the name of a benchmark's twin with grey images
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Id = tuple[str, str]  # a benchmark's name and that of a task of it
Place = tuple[Id, int]  # where a question is: its task, and which of its questions


def share_questions(processes: int) -> PartialState:
    """This process among those that ask; has its GPU, if there are any.

    Raises ValueError if this is not the number of processes that the configuration says.
    """
    patience = timedelta(weeks=1)  # of a process that waits for the last answers of others
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=patience)
    if state.num_processes != processes:
        raise ValueError(
            f"evaluate.processes: the configuration says {processes}, this evaluation was started "
            f"with {state.num_processes}. Start it with: torchrun --nproc-per-node {processes} -m "
            "-- sts evaluate ..."
        )
    return state


def load_model(weights: str | Path, precision: str, config: Config) -> LM:
    """The checkpoint of a run as lm-eval's `hf-multimodal`, in this precision (`fp32`, `bf16`), on
    this process's GPU if there is one. Raises MemoryError as `check_evaluation`."""
    torch.set_num_threads(config.stage(config.last).threads)
    code = {"trust_remote_code": config.model.trust_remote_code}
    load = AutoModelForImageTextToText.from_pretrained
    model = load(weights, dtype=TYPES[precision], **code)
    check_evaluation(model.config, model.num_parameters(), config.evaluate, precision)
    # 0: asks all that it is given at once. A model that is loaded already leaves it to us which
    # process asks what
    return _Model(model.to(PartialState().device), batch_size=0, **code)


class _Model(HFMultimodalLM):
    """Asks as the model was trained, with images of any mode, until its own end of a turn; cuts
    nothing off: lm-eval cuts the beginning of a long question, the image with it."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)
        ends, end = self.model.generation_config.eos_token_id, end_token(self.processor)
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        if end is not None and end not in ends:
            self.model.generation_config.eos_token_id = [*ends, end]

    def length(self, request: Instance) -> int:
        """Tokens of a question, visual tokens among them."""
        prompt, _, shown = request.args
        sizes = [(image.height, image.width) for image in shown["visual"]]
        return length(self.processor, prompt, sizes)

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
        return super().tok_batch_multimodal_encode(strings, images, **options)


def ask(
    lm: LM, tasks: Mapping[Id, Task], places: Sequence[Place], batch_tokens: int, folder: Path
) -> Iterator[tuple[int, Id, dict[str, Any]]]:
    """The questions at these places, of which this process asks its share of the pieces.

    Args:
        lm: The model.
        tasks: By benchmark and name.
        places: Of the questions that all processes ask together.
        batch_tokens: The most tokens of a batch of several questions, padding counted.
        folder: Keeps answers, of the same questions to the same model.

    Yields:
        Number of the piece, the task, and lm-eval's sample with `fits`: whether the question and
        an answer fit into the model's context. If not it is not asked and its answer is empty.
    """
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # else a bar for each task's prompts
    lm_eval.evaluator.LMEVAL_HASHMM = False  # else every image is written as PNG four times
    direct = {id: _direct(tasks[id]) for id in dict.fromkeys(id for id, _ in places)}
    state, kept = PartialState(), kept_answers(folder)
    folder.mkdir(parents=True, exist_ok=True)
    step = AT_ONCE * state.num_processes
    with open(folder / f"answers{state.process_index}.jsonl", "a", encoding="utf-8") as file:
        file.write("\n")  # ends a line that was torn
        for start in range(AT_ONCE * state.process_index, len(places), step):
            piece = defaultdict(list)
            for id, place in places[start : start + AT_ONCE]:
                piece[id].append(place)
            in_order = [(id, place) for id in piece for place in piece[id]]
            # lm-eval deals questions out to processes by itself: to it we are one
            asks = SimpleNamespace(
                rank=0, world_size=1, MULTIMODAL=True, tokenizer_name=lm.tokenizer_name,
                apply_chat_template=lm.apply_chat_template,
                generate_until=partial(_answers, lm, batch_tokens, in_order, kept, file),
            )  # fmt: skip
            set_seed(start)  # MMMU's task guesses where it finds no letter in the answer
            gc.freeze()  # garbage is collected after every batch: half the time otherwise
            try:
                samples = lm_eval.evaluate(
                    lm=asks,
                    task_dict={"tasks": {id: direct[id] for id in piece}},
                    samples=dict(piece),
                    apply_chat_template=True,
                    bootstrap_iters=0,
                )["samples"]
            finally:
                gc.unfreeze()
            for id in piece:
                direct[id]._instances = None  # the pictures
                for sample in samples[id]:
                    fits = kept[id, sample["doc_id"]] is not None
                    yield start, id, sample | {"fits": fits}


def _answers(
    lm: LM,
    batch_tokens: int,
    places: Sequence[Place],
    kept: dict[Place, str | None],
    file: Any,
    requests: Sequence[Instance],
) -> list[str]:
    """The answers to the questions of a piece, "" to one that doesn't fit. Of a batch of which one
    is not kept all are asked, and written to the file."""
    asked = dict(zip(places, requests, strict=True))
    lengths, kinds = {}, {}
    for place, request in asked.items():
        settings, tokens = request.args[1], lm.length(request)
        if tokens + settings.get("max_gen_toks", lm.max_gen_toks) > lm.max_length:
            kept[place] = None
        else:
            lengths[place], kinds[place] = tokens, str(settings)
    for batch in batches(lengths, kinds, batch_tokens):
        if kept.keys() >= set(batch):
            continue
        outputs = lm.generate_until([asked[place] for place in batch], disable_tqdm=True)
        answers = dict(zip(batch, outputs, strict=True))
        file.write("".join(f"{json.dumps([*answer])}\n" for answer in answers.items()))
        file.flush()
        kept |= answers
    return [kept[place] or "" for place in places]


def batches(
    lengths: Mapping[Place, int], kinds: Mapping[Place, str], most: int
) -> list[list[Place]]:
    """Which questions are asked together: of one kind, of at most so many tokens with padding or
    one alone. The longest come first, so that memory that lacks, lacks at once."""
    of_kinds: dict[str, list[list[Place]]] = defaultdict(list)
    for place in sorted(lengths, key=lengths.__getitem__, reverse=True):
        of_kind = of_kinds[kinds[place]]
        if of_kind and (len(of_kind[-1]) + 1) * lengths[of_kind[-1][0]] <= most:
            of_kind[-1].append(place)
        else:
            of_kind.append([place])
    return sorted(chain(*of_kinds.values()), key=lambda batch: lengths[batch[0]], reverse=True)


def kept_answers(folder: Path) -> dict[Place, str]:
    """The answers in a folder, but for a line that was torn or spoilt."""
    answers = {}
    for file in sorted(folder.glob("answers*.jsonl")):
        for line in file.read_bytes().splitlines():
            with suppress(ValueError, TypeError):
                ((name, task), place), output = json.loads(line)
                answers[(name, task), place] = output
    return answers


def forget_answers(folder: Path) -> None:
    """Take away what `ask` kept in a folder and in those beside it, of other keys."""
    for file in folder.parent.glob("*/answers*.jsonl"):
        file.unlink(missing_ok=True)  # another evaluation of the same may end now


def _direct(task: Task) -> Task:
    """The same task, which looks up only the questions at the places that it is given: lm-eval
    decodes all that there are, twice, and looks for each in the list of places."""
    twin, docs = copy.copy(task), task.eval_docs
    twin.doc_iterator = lambda *, samples, **_: enumerate(docs[place] for place in samples)
    return twin


def draw_places(tasks: Mapping[Id, Task], limit: int | None, grey: float) -> list[tuple[Id, int]]:
    """Where the questions are that are asked: of a benchmark `limit` (None: all), of its blind twin
    the share `grey` of them. Those that are scored together (`metadata.bundle` of a task file) are
    asked together: as many bundles as the number holds, and one at least. They are the first of an
    order that a fixed seed gives, so fewer are a part of more."""
    questions = defaultdict(list)
    for id, task in tasks.items():
        bundles_of = (task.config.metadata or {}).get("bundle") or (lambda docs: range(len(docs)))
        bundles = enumerate(bundles_of(task.eval_docs))
        questions[id[0]] += [((id, place), (id, bundle)) for place, bundle in bundles]
    places = []
    for name, of_benchmark in questions.items():
        count = len(of_benchmark)
        most = min(limit or count, count)
        most = math.ceil(most * grey) if name.endswith(BLIND) else most
        sizes = Counter(bundle for _, bundle in of_benchmark)
        order = random.Random(len(sizes)).sample([*sizes], len(sizes))
        ends = accumulate(sizes[bundle] for bundle in order)
        drawn = {bundle for bundle, end in zip(order, ends, strict=True) if end <= most}
        places += [place for place, bundle in of_benchmark if bundle in (drawn or order[:1])]
    return places
