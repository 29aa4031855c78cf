"""The toy decoder, in place of Vicuna: a Llama that never sees a pixel.

It answers questions about, and captions, pictures *written* in words. Each patch is one slot, the
sum of the embeddings of its words (`lessons.written`), so a slot has the place and the length of a
visual token.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.mini import lessons
from recipes.mini.muon import apart, learner
from recipes.mini.vision import autocast, batched, patch_places
from sts.mini import pictures, scenes
from sts.settings import IGNORE_INDEX

BATCH = 24  # samples of a step
WIDTH, MLP_WIDTH = 64, 192
FEW = 48  # slots of a picture that most steps show
LAST = 4  # of the legs, from 0


def language_config(tokenizer: PreTrainedTokenizerFast, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=MLP_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )


def slot_ids(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """[attributes + 2, values + 1] ids: the word of value v of attribute a; row and column last."""
    lists = [*pictures.ATTRIBUTES.values()]
    lists += [[f"{axis}{i + 1}" for i in range(pictures.GRID)] for axis in "rc"]
    table = torch.full((len(lists), 1 + max(map(len, lists))), tokenizer.pad_token_id)
    for a, words in enumerate(lists):
        for v, word in enumerate(words):
            (table[a, v + 1],) = tokenizer.encode(f" {word}", add_special_tokens=False)
    return table


def written_slots(embed: nn.Embedding, table: Tensor, truth: Tensor) -> Tensor:
    """Truth [batch, 144, attributes] -> slots [batch, 144, dim], each a sum of word embeddings."""
    values = torch.cat([truth, patch_places().expand(len(truth), -1, -1) + 1], -1)
    ids = table[torch.arange(len(table)), values]  # [batch, 144, attributes + 2]
    return (embed(ids) * (values > 0)[..., None]).sum(2)


def smudge(truth: Tensor, generator: torch.Generator, share: float = 0.02) -> Tensor:
    """Forget a few attributes at random: a vision tower is not always right."""
    keep = torch.rand(truth.shape, generator=generator) >= share
    return truth * keep


def encode_turns(
    tokenizer: PreTrainedTokenizerFast, turns: list[tuple[str, str]]
) -> tuple[list[int], list[int], list[int]]:
    """What follows the picture: ids, labels (-100 but on answers and their end), turn of each."""
    ids: list[int] = []
    labels: list[int] = []
    turn: list[int] = []
    for index, (question, answer) in enumerate(turns, start=1):
        prompt = tokenizer.encode(f"\n{question} assistant:", add_special_tokens=False)
        reply = tokenizer.encode(f" {answer}</s>", add_special_tokens=False)
        ids += prompt + reply
        labels += [IGNORE_INDEX] * len(prompt) + reply
        turn += [index] * (len(prompt) + len(reply))
    return ids, labels, turn


def written_batch(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict], captions: int
) -> dict[str, Tensor]:
    """Rows as tensors: truth [batch, 144, attributes]; ids, labels, turn, place [batch, tokens].

    The first `captions` rows are captioned, the others asked. `place` counts from 0 in every turn.
    """
    encoded = [
        encode_turns(
            tokenizer,
            [(scenes.CAPTION_REQUEST, row["caption"])]
            if index < captions
            else [(qa["question"], qa["answer"]) for qa in row["qa"]],
        )
        for index, row in enumerate(rows)
    ]
    longest = max(len(ids) for ids, _, _ in encoded)
    fill = {"ids": tokenizer.pad_token_id, "labels": IGNORE_INDEX, "turn": -1, "place": 0}
    batch = {name: torch.full((len(rows), longest), value) for name, value in fill.items()}
    for i, (ids, labels, turn) in enumerate(encoded):
        starts = [turn.index(t) for t in turn]
        places = [j - start for j, start in enumerate(starts)]
        for name, values in zip(fill, (ids, labels, turn, places), strict=True):
            batch[name][i, : len(values)] = torch.tensor(values)
    batch["truth"] = torch.from_numpy(np.stack([row["truth"] for row in rows])).long()
    return batch


def ask(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    table: Tensor,
    batch: dict,
    only: Tensor | None = None,
    noise: Tensor | None = None,
    length: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Answer logits [answer tokens, vocabulary] and their labels.

    Every turn sees the written picture and itself, not the other turns: they would otherwise be the
    nearest place to look up a word, and the picture is not learnt to be read. `only` [batch, 144]
    leaves out the slots where it is false (the curriculum's short pictures); `noise` [batch, 144,
    dim], in standard deviations of the slots, is added to them; `length` [batch, 1, 1] is a factor
    on them.
    """
    embed = model.get_input_embeddings()
    slots = written_slots(embed, table, batch["truth"])
    if noise is not None:
        slots = slots + noise * slots.detach().std()
    slots = slots * length
    if only is not None:
        longest = int(only.sum(1).max())
        first = torch.sort((~only).int(), dim=1, stable=True).indices[:, :longest]
        slots = slots.gather(1, first[..., None].expand(-1, -1, slots.shape[-1]))
    prefix = torch.tensor(tokenizer.encode("user: ", add_special_tokens=False))
    size, shown = len(slots), len(prefix) + slots.shape[1]
    inputs = torch.cat([embed(prefix).expand(size, -1, -1), slots, embed(batch["ids"])], 1)
    turn = torch.cat([torch.zeros(size, shown, dtype=torch.long), batch["turn"]], 1)
    visible = (turn[:, None] == turn[:, :, None]) | (turn[:, None] == 0)
    visible &= torch.ones(visible.shape[-1], visible.shape[-1], dtype=torch.bool).tril()
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.bfloat16).min)
    start = len(prefix) + pictures.GRID**2
    places = torch.cat([torch.arange(shown).expand(size, -1), start + batch["place"]], 1)
    hidden = model.model(
        inputs_embeds=inputs, attention_mask=mask[:, None], position_ids=places, use_cache=False
    ).last_hidden_state[:, shown - 1 : -1]
    answers = batch["labels"] != IGNORE_INDEX
    return model.lm_head(hidden[answers]).float(), batch["labels"][answers]


def few(truth: Tensor, generator: torch.Generator) -> Tensor:
    """Truth [batch, 144, attributes] -> [batch, 144] bool, true for `FEW` slots a picture: all
    centres, then mostly other slots of things, and some of background."""
    rank = torch.rand(truth.shape[:2], generator=generator)
    rank = rank + 0.5 * (truth[..., 0] > 0) + 2 * (truth[..., -1] > 0)
    return rank >= rank.topk(FEW, dim=1).values[:, -1:]


def fresh_decoder(tokenizer: PreTrainedTokenizerFast, layers: int, seed: int) -> LlamaForCausalLM:
    """A decoder before its training."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(language_config(tokenizer, layers)).train()
    model.set_attn_implementation("sdpa")
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # a sum of 2 x layers terms
            parameter.data /= math.sqrt(2 * layers)
    return model


def train_language(
    tokenizer: PreTrainedTokenizerFast, steps: int, layers: int, batch: int = BATCH, seed: int = 0
) -> LlamaForCausalLM:
    """A decoder that answers about, and captions, written pictures.

    Two sevenths of the steps are to read. Until 3/8 of them all questions, on pictures that grow
    from a slot a thing to all slots of things to all slots. Then two of three (from 0.7 on: one)
    are a drill in finding, counting and comparing places (`lessons.drill`), again from short
    pictures to whole ones: without them relations stay at chance, and with nothing else before them
    colours do.
    The rest, five legs at half the learning rate, makes every picture's slots 1/2 to 16 times as
    long: a projector's outputs are about ten times as long as word embeddings. Whole pictures take
    long, so they come in every other leg, else they have `FEW` slots. The last leg is for captions,
    which a projector is aligned with: before it the decoder read places but hardly wrote them.
    Muon on the matrices (it needed far fewer steps than AdamW here), AdamW on embeddings and norms.
    """
    model = fresh_decoder(tokenizer, layers, seed)
    first, leg = max(2 * steps // 7, 1), max(steps // 7, 1)
    matrices, others = apart(model.named_parameters())
    learn = learner(matrices, others, first, leg, lr=3e-3, weight_decay=0.0, fused=True)
    table = slot_ids(tokenizer)
    errors = torch.Generator().manual_seed(seed)
    mixed = batched(scenes.rows("language", 10**9, seed), batch)
    drills = batched(lessons.drill("drill", 10**9, seed), batch)
    bar = tqdm(range(steps), "language", mininterval=10)
    for step in bar:
        done = step / first
        drilling = done >= 3 / 8 and (step % 3 == 0 or (step % 3 == 1 and done < 0.7))
        legs = (step - first) // leg
        if done >= 1:
            drilling = step % (4 if legs == LAST else 2) == 0
        captions = 0 if drilling else batch // (2 if legs == LAST else 8)
        inputs = written_batch(tokenizer, next(drills if drilling else mixed), captions)
        truth = inputs["truth"]
        only = None
        if done < (5 / 8 if drilling else 1 / 16):
            only = truth[..., -1] > 0
        elif done < (0.7 if drilling else 1 / 6):
            only = truth[..., 0] > 0
        is_whole = step % 2 if legs == LAST else legs % 2
        if only is None and (done < 1 or not is_whole):
            only = few(truth, errors)
        inputs["truth"] = smudge(truth, errors)
        noise = 0.1 * torch.randn(batch, pictures.GRID**2, WIDTH, generator=errors)
        length = torch.ones(batch, 1, 1)
        if done >= 1:
            length = 2 ** torch.empty(batch, 1, 1).uniform_(-1, 4, generator=errors)
        with autocast():
            logits, labels = ask(model, tokenizer, table, inputs, only, noise, length)
        # the end token is easy, and so are the many words of a caption but for its places
        row = (inputs["labels"] != IGNORE_INDEX).nonzero()[:, 0]
        weight = torch.where(labels == tokenizer.eos_token_id, 0.2, 1.0)
        weight = torch.where(row < captions, 1.0 if legs == LAST else 0.3, weight)
        losses = F.cross_entropy(logits, labels, reduction="none") * weight
        loss = losses.sum() / weight.sum()
        learn(loss)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


@torch.no_grad()
def reading(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: int = 256,
    split: str = "reading",
) -> dict[str, float]:
    """Share of right answers, by skill, to questions about written pictures not trained on."""
    table = slot_ids(tokenizer)
    right: dict[str, list[bool]] = {}
    for part in batched(scenes.rows(split, rows, 0), 64):
        batch = written_batch(tokenizer, part, captions=0)
        logits, labels = ask(model.eval(), tokenizer, table, batch)
        row, token = (batch["labels"] != IGNORE_INDEX).nonzero(as_tuple=True)
        question = 100 * row + batch["turn"][row, token]
        correct = torch.ones(100 * len(part), dtype=torch.long)
        correct.scatter_reduce_(0, question, (logits.argmax(-1) == labels).long(), "amin")
        for index in question.unique().tolist():
            skill = part[index // 100]["qa"][index % 100 - 1]["skill"]
            right.setdefault(skill, []).append(bool(correct[index]))
    return {skill: round(float(np.mean(answers)), 3) for skill, answers in sorted(right.items())}


def reading_without(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: int = 512
) -> dict[str, float]:
    """The mean of the skills with each decoder layer left out, by its index; `none`: with all."""
    layers, means = model.model.layers, {}
    for index in (None, *range(len(layers))):
        rest = (layer for place, layer in enumerate(layers) if place != index)
        model.model.layers = torch.nn.ModuleList(rest)
        shares = [*reading(model, tokenizer, rows, split="reading_without").values()]
        means["none" if index is None else str(index)] = round(float(np.mean(shares)), 3)
    model.model.layers = layers
    return means
