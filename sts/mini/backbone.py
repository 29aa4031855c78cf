"""The mini scale's stand-ins for CLIP and Vicuna: trained once, shared by every run.

    python -m sts backbone --config workflow/config/mini.yaml --out results/mini/backbone.json

vision     a CLIP vision tower; every patch is told what it shows (the generator's ground truth),
           the CLS token which things the picture holds
language   a Llama decoder that never sees a pixel: it answers questions about, and captions,
           pictures *written* in words. Each patch is one slot, the sum of the embeddings of its
           words (`scenes.written`), so a slot has the place and the length of a visual token

`build_llava` joins the two by a fresh projector: the start of every alignment run.
"""

import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sts.mini import scenes
from sts.pipeline.config import Config
from sts.pipeline.data.conversation import CHAT_TEMPLATE
from sts.pipeline.device import bf16_is_native
from sts.pipeline.provenance import sha256_file, sha256_json, write_json_atomic
from sts.settings import IGNORE_INDEX

SHIPPED = Path("data/backbones/mini")
WIDTH = 128
EXTRA_WORDS = (
    "does the image contain not present in shape rectangle gray black teal brown true false or"
)
MEAN, STD = [0.5] * 3, [0.25] * 3


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: every word of `scenes` is one token, any other text is spelled."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" ?[A-Za-z0-9]+|[^A-Za-z0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [*scenes.vocabulary(), *EXTRA_WORDS.split()]
    corpus = [text for word in words for text in (word, f" {word}")]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<pad>", "<s>", "</s>", "<image>", "user:", "assistant:"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=2048,
    )


def vision_config() -> CLIPVisionConfig:
    """Five layers: LLaVA reads the fourth (`vision_feature_layer: -2`), CLS learns on the last."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=scenes.SIZE,
        patch_size=scenes.PATCH,
    )


def language_config(tokenizer: PreTrainedTokenizerFast, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )


def pixels(images: np.ndarray) -> Tensor:
    """uint8 [batch, 64, 64, 3] -> float [batch, 3, 64, 64], as the image processor does it."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def batched(rows: Iterator[dict], size: int) -> Iterator[list[dict]]:
    """Lists of `size` rows."""
    while batch := list(islice(rows, size)):
        yield batch


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def patch_places() -> Tensor:
    """[64, 2]: row and column of every patch, from 0."""
    patch = torch.arange(scenes.GRID**2)
    return torch.stack([patch // scenes.GRID, patch % scenes.GRID], -1)


def projected(hidden_states: tuple[Tensor, ...]) -> Tensor:
    """What the projector will be given: the patches [batch, 64, dim] of the layer before the last,
    here as unit-variance features."""
    return F.layer_norm(hidden_states[-2][:, 1:].float(), (WIDTH,))


def autocast() -> torch.autocast:
    """Forward passes in bf16, on a processor that computes in it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_native())


def train_vision(steps: int, batch: int = 48, seed: int = 0, lr: float = 1.5e-3) -> CLIPVisionModel:
    """Dense supervision: from a patch's feature, each attribute of the thing that it shows, and
    its row and column (the decoder reads places from the features, not from their order)."""
    torch.manual_seed(seed)
    model = CLIPVisionModel(vision_config()).train()
    model.set_attn_implementation("eager")  # the backward of the fused kernel is slow on a CPU
    sizes = [len(values) + 1 for values in scenes.ATTRIBUTES.values()]
    patch_head = nn.Linear(WIDTH, sum(sizes))
    place_head = nn.Linear(WIDTH, 2 * scenes.GRID)
    scene_head = nn.Linear(WIDTH, sum(sizes))
    heads = nn.ModuleList([patch_head, place_head, scene_head])
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: cosine(s, steps, 50))
    rows_of = batched(scenes.rows("vision", steps * batch, seed, turns=1), batch)
    bar = tqdm(rows_of, "vision", total=steps, mininterval=10)
    for rows in bar:
        truth = torch.from_numpy(np.stack([row["truth"] for row in rows])).long()
        with autocast():
            out = model(pixels(np.stack([row["image"] for row in rows])), output_hidden_states=True)
        features = projected(out.hidden_states)
        logits = patch_head(features).split(sizes, -1)
        where = place_head(features).unflatten(-1, (2, scenes.GRID))
        # nine patches of ten show background: they weigh a tenth, or the things are learnt late;
        # an attribute is asked for only where it applies; centres, which counting hangs on, triply
        things = truth[..., 0] > 0
        weight = torch.where(things, 1.0, 0.1)
        weights = [weight, *((truth[..., i] > 0).float() for i in range(1, len(sizes) - 1)), things]
        factors = [1.0] * (len(sizes) - 1) + [3.0]
        loss = sum(
            (
                F.cross_entropy(part.movedim(-1, 1), truth[..., i], reduction="none") * weights[i]
            ).sum()
            * factors[i]
            / weights[i].sum().clamp(min=1)
            for i, part in enumerate(logits)
        )
        place = patch_places().expand(len(rows), -1, -1)
        loss = loss + F.cross_entropy(where.movedim(-1, 1), place)
        present = torch.cat(
            [F.one_hot(truth[..., i], n).amax(1) for i, n in enumerate(sizes)], -1
        ).float()
        seen = scene_head(out.pooler_output.float())
        loss = loss + F.binary_cross_entropy_with_logits(seen, present)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def slot_ids(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """[attributes + 2, values + 1] ids: the word of value v of attribute a; row and column last."""
    lists = [*scenes.ATTRIBUTES.values()]
    lists += [[f"{axis}{i + 1}" for i in range(scenes.GRID)] for axis in "rc"]
    table = torch.full((len(lists), 1 + max(map(len, lists))), tokenizer.pad_token_id)
    for a, words in enumerate(lists):
        for v, word in enumerate(words):
            (table[a, v + 1],) = tokenizer.encode(f" {word}", add_special_tokens=False)
    return table


def written_slots(embed: nn.Embedding, table: Tensor, truth: Tensor) -> Tensor:
    """Truth [batch, 64, attributes] -> slots [batch, 64, dim], each a sum of word embeddings."""
    values = torch.cat([truth, patch_places().expand(len(truth), -1, -1) + 1], -1)
    ids = table[torch.arange(len(table)), values]  # [batch, 64, attributes + 2]
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
        asked = tokenizer.encode(f"\n{question} assistant:", add_special_tokens=False)
        given = tokenizer.encode(f" {answer}</s>", add_special_tokens=False)
        ids += asked + given
        labels += [IGNORE_INDEX] * len(asked) + given
        turn += [index] * (len(asked) + len(given))
    return ids, labels, turn


def written_batch(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict], captions: int
) -> dict[str, Tensor]:
    """Rows as tensors: truth [batch, 64, attributes]; ids, labels, turn, place [batch, tokens].

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
    nearest place to look up a word, and the picture is not learnt to be read. `only` [batch, 64]
    leaves out the slots where it is false (the curriculum's short pictures); `noise` [batch, 64,
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
    seen = (turn[:, None] == turn[:, :, None]) | (turn[:, None] == 0)
    seen &= torch.ones(seen.shape[-1], seen.shape[-1], dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
    start = len(prefix) + scenes.GRID**2
    places = torch.cat([torch.arange(shown).expand(size, -1), start + batch["place"]], 1)
    hidden = model.model(
        inputs_embeds=inputs, attention_mask=mask[:, None], position_ids=places, use_cache=False
    ).last_hidden_state[:, shown - 1 : -1]
    answers = batch["labels"] != IGNORE_INDEX
    return model.lm_head(hidden[answers]).float(), batch["labels"][answers]


def train_language(
    tokenizer: PreTrainedTokenizerFast, steps: int, layers: int, batch: int = 32, seed: int = 0
) -> LlamaForCausalLM:
    """A decoder that answers about, and captions, written pictures.

    Half of the steps teach to read. Until 3/8 of them all questions, on pictures that grow from a
    slot a thing to all slots of things to all slots. Then two steps of three (from 0.7 on: one) are
    a drill in finding, counting and comparing places (`scenes.drill`), again from short pictures to
    whole ones: without them relations stay at chance, and with nothing else before them colours do.
    The other half, two legs at half the learning rate, makes every picture's slots 1/2 to 16 times
    as long: a projector's outputs are about ten times as long as word embeddings. Muon on the
    matrices (it needed far fewer steps than AdamW here), AdamW on embeddings and norms.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(language_config(tokenizer, layers)).train()
    model.set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # a sum of 2 x layers terms
            parameter.data /= math.sqrt(2 * layers)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    first, leg = steps // 2, steps // 4

    def rate(step: int) -> float:
        if step < first:
            return cosine(step, first, 50)
        return cosine((step - first) % leg, leg, 50) / 2

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    table = slot_ids(tokenizer)
    errors = torch.Generator().manual_seed(seed)
    mixed = batched(scenes.rows("language", 10**9, seed), batch)
    drills = batched(scenes.drill("drill", 10**9, seed), batch)
    bar = tqdm(range(steps), "language", mininterval=10)
    for step in bar:
        done = step / first
        drilling = done >= 3 / 8 and (step % 3 == 0 or (step % 3 == 1 and done < 0.7))
        if done >= 1:
            drilling = step % 2 == 0
        captions = 0 if drilling else batch // 8
        inputs = written_batch(tokenizer, next(drills if drilling else mixed), captions)
        truth = inputs["truth"]
        only = None
        if done < (5 / 8 if drilling else 1 / 16):
            only = truth[..., -1] > 0
        elif done < (0.7 if drilling else 1 / 6):
            only = truth[..., 0] > 0
        inputs["truth"] = smudge(truth, errors)
        noise = 0.1 * torch.randn(batch, scenes.GRID**2, WIDTH, generator=errors)
        length = torch.ones(batch, 1, 1)
        if done >= 1:
            length = 2 ** torch.empty(batch, 1, 1).uniform_(-1, 4, generator=errors)
        with autocast():
            logits, labels = ask(model, tokenizer, table, inputs, only, noise, length)
        # the end token and the words of a caption are easy and many
        row = (inputs["labels"] != IGNORE_INDEX).nonzero()[:, 0]
        weight = torch.where(labels == tokenizer.eos_token_id, 0.2, 1.0)
        weight = torch.where(row < captions, 0.3, weight)
        losses = F.cross_entropy(logits, labels, reduction="none") * weight
        loss = losses.sum() / weight.sum()
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


@torch.no_grad()
def reading(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: int = 256
) -> dict[str, float]:
    """Share of right answers, by skill, to questions about written pictures not trained on."""
    table = slot_ids(tokenizer)
    right: dict[str, list[bool]] = {}
    for part in batched(scenes.rows("reading", rows, 0), 64):
        batch = written_batch(tokenizer, part, captions=0)
        logits, labels = ask(model.eval(), tokenizer, table, batch)
        row, token = (batch["labels"] != IGNORE_INDEX).nonzero(as_tuple=True)
        question = 100 * row + batch["turn"][row, token]
        correct = torch.ones(100 * len(part), dtype=torch.long)
        correct.scatter_reduce_(0, question, (logits.argmax(-1) == labels).long(), "amin")
        for index in question.unique().tolist():
            skill = part[index // 100]["qa"][index % 100 - 1]["skill"]
            right.setdefault(skill, []).append(bool(correct[index]))
    return {skill: round(float(np.mean(found)), 3) for skill, found in sorted(right.items())}


@torch.no_grad()
def seeing(model: CLIPVisionModel, rows: int = 768) -> dict[str, float]:
    """Share of patches that show a thing of which a linear probe (discriminant analysis, fitted on
    three quarters of the pictures) names an attribute rightly; of those only that have it."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis  # only a rebuild needs it

    pictures = list(scenes.rows("seeing", rows, 0, turns=1))
    outputs = (
        model(pixels(np.stack([row["image"] for row in part])), output_hidden_states=True)
        for part in batched(iter(pictures), 64)
    )
    seen = torch.cat([projected(out.hidden_states) for out in outputs]).numpy()
    truth = np.stack([row["truth"] for row in pictures])
    fitted = 3 * rows // 4
    shares = {}
    for index, name in enumerate(scenes.ATTRIBUTES):
        asked = truth[..., 0 if name == "centre" else index] > 0
        known, judged = asked[:fitted], asked[fitted:]
        probe = LinearDiscriminantAnalysis()
        probe.fit(seen[:fitted][known], truth[:fitted, :, index][known])
        right = probe.score(seen[fitted:][judged], truth[fitted:, :, index][judged])
        shares[name] = round(float(right), 3)
    return shares


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Images squashed to 64x64, 64 placeholders an image, our chat template."""
    side = {"height": scenes.SIZE, "width": scenes.SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size=side, crop_size=side, do_center_crop=False, image_mean=MEAN, image_std=STD
        ),
        tokenizer=tokenizer,
        patch_size=scenes.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def rebuild(
    folder: Path, layers: int, vision_steps: int, language_steps: int, threads: int
) -> None:
    """Train both backbones and save them, in half precision as CLIP and Vicuna are shipped, with
    what they can do in `quality.json`."""
    torch.set_num_threads(threads)
    tokenizer = make_tokenizer()
    make_processor(tokenizer).save_pretrained(folder / "processor")
    vision = train_vision(vision_steps)
    language = train_language(tokenizer, language_steps, layers)
    quality = {"seeing": seeing(vision), "reading": reading(language, tokenizer)}
    write_json_atomic(folder / "quality.json", quality)
    vision.half().save_pretrained(folder / "vision")
    language.half().save_pretrained(folder / "language")


def main(config: Config, out: Path) -> dict:
    """Write the backbone manifest: the shipped files, ones trained anew beside `out`, or pretrained
    ones by hub id or folder."""
    model = config.model
    if model.backbone == "pretrained":
        parts = {"vision": model.vision, "language": model.language, "processor": None}
        manifest = {**parts, "sha256": sha256_json(parts)}
    else:
        folder = SHIPPED
        if model.backbone == "rebuild":
            folder = out.parent / f"rebuilt-{sha256_json(model.model_dump())[:8]}"
            if not (folder / "language" / "config.json").exists():
                rebuild(
                    folder, model.layers, model.vision_steps, model.language_steps, model.threads
                )
        parts = {name: folder / name for name in ("vision", "language", "processor")}
        files = sorted(
            path for part in parts.values() for path in part.rglob("*") if path.is_file()
        )
        if not files:
            raise FileNotFoundError(
                f"{folder}: no backbone files; get them with `git checkout -- {folder}` or set "
                "model.backbone: rebuild"
            )
        manifest = {name: str(part) for name, part in parts.items()}
        manifest["sha256"] = sha256_json([[file.name, sha256_file(file)] for file in files])
    manifest["vision_feature_layer"] = model.vision_feature_layer
    write_json_atomic(out, manifest)
    return manifest


def build_llava(
    manifest: str | Path, seed: int
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The two backbones of a manifest, float32, joined by a projector drawn from `seed`."""
    parts = json.loads(Path(manifest).read_text(encoding="utf-8"))
    vision = CLIPVisionModel.from_pretrained(parts["vision"], dtype=torch.float32)
    language = LlamaForCausalLM.from_pretrained(parts["language"], dtype=torch.float32)
    if parts["processor"]:
        processor = LlavaProcessor.from_pretrained(parts["processor"])
    else:
        processor = pretrained_processor(parts["vision"], parts["language"], vision, language)
    tokenizer = processor.tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=vision.config,
                text_config=language.config,
                image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
                vision_feature_layer=parts.get("vision_feature_layer", -2),
                vision_feature_select_strategy="default",
                tie_word_embeddings=language.config.tie_word_embeddings,
            )
        )
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model, processor


def pretrained_processor(
    vision_name: str, language_name: str, vision: CLIPVisionModel, language: LlamaForCausalLM
) -> LlavaProcessor:
    """A LLaVA processor from the two parts' own; the image token is added to the language model."""
    tokenizer = AutoTokenizer.from_pretrained(language_name, padding_side="left")
    tokenizer.add_special_tokens({"extra_special_tokens": {"image_token": "<image>"}})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    language.resize_token_embeddings(len(tokenizer))
    return LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(vision_name),
        tokenizer=tokenizer,
        patch_size=vision.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
