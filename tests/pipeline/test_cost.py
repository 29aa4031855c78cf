"""Costs from shapes against what torch counts on the real model."""

import subprocess
import sys

import pytest
import torch
from configs import RECIPE
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from zoo import ZOO

from sts import LDS, VTC, sparsify
from sts.architectures import NO_VTC, REFUSED, part_finder
from sts.lds.decision import Decision
from sts.lds.units import skip_backward
from sts.pipeline.config import LoraConfig, StageConfig
from sts.pipeline.cost.flops import (
    ROUGH,
    flop_parts,
    peak_memory,
    shape_of,
    step_flops,
    tower_work,
    trained_parameters,
)
from sts.pipeline.cost.history import measure
from sts.pipeline.measure.shape_bench import FUSED_ON_CPU
from sts.pipeline.measure.shapes import joined, made_up_batch, random_model
from sts.pipeline.measure.shapes import shape as known
from sts.pipeline.train.lora import add_adapters
from sts.pipeline.train.model import freeze, recompute

SHAPES = {
    "wide": {
        "width": 96,
        "mlp": 256,
        "heads": 4,
        "kv_heads": 2,
        "layers": 6,
        "side": 6,
        "vocab": 4096,
    },
    "long": {
        "width": 48,
        "mlp": 96,
        "heads": 3,
        "kv_heads": 3,
        "layers": 4,
        "side": 12,
        "vocab": 100,
    },
    "deep": {
        "width": 64,
        "mlp": 160,
        "heads": 8,
        "kv_heads": 1,
        "layers": 12,
        "side": 4,
        "vocab": 512,
    },
}
BATCH, TEXT, ANSWERS, RANK = 3, 10, 4, 5
ALIGN, INSTRUCT = ("projector",), ("projector", "language_model")  # as the paper trains
TRAINED = {
    "align": ALIGN,
    "instruct": INSTRUCT,
    "language": ("language_model",),
    "tower": ("vision_tower",),
    "tower and projector": ("vision_tower", "projector"),
    "all": ("vision_tower", "projector", "language_model"),
    "lora": ("lora",),
    "lora and projector": ("lora", "projector"),
    "lora and tower": ("lora", "vision_tower"),
}
SETTINGS = {
    "dense": {},
    "vtc": {"vtc": VTC(kind="avgpool2d", keep=0.25)},
    "vtc and lds": {"vtc": VTC("uniform", keep=0.5), "lds": LDS("sts", rate=0.6, epsilon=0.5)},
    "layer": {"lds": LDS("layerdrop", rate=0.5, draw="fixed_count")},
    "samples": {"lds": LDS("layerskip", rate=0.9, depth="linear")},
    "tokens": {"lds": LDS("random_ltd", rate=0.5)},
    "backward": {"lds": LDS("dropbp", rate=0.5)},
}


def build(name, trains=INSTRUCT, attention="sdpa", checkpointing=False):
    shape = SHAPES[name]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=8 * shape["side"],
            patch_size=8,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
        ),
        text_config=LlamaConfig(
            hidden_size=shape["width"],
            intermediate_size=shape["mlp"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            vocab_size=shape["vocab"],
        ),
        image_token_id=99,
        image_seq_length=shape["side"] ** 2,
    )
    model = LlavaForConditionalGeneration(config)
    model.set_attn_implementation(attention)
    freeze(model, [part for part in trains if part != "lora"])
    if "lora" in trains:
        add_adapters(model, LoraConfig(rank=RANK), seed=0)
    recompute(model, checkpointing)
    with sparsify(model) as scheme:  # its forward is asked once what it sees, no part of it
        scheme.begin_step(0)
        model(**batch_for(model))
    return model


def batch_for(model):
    side, patches = model.config.vision_config.image_size, model.config.image_seq_length
    ids = torch.randint(1, 90, (BATCH, patches + TEXT))
    ids[:, :patches] = 99
    labels = torch.full_like(ids, -100)
    labels[:, -ANSWERS:] = ids[:, -ANSWERS:]
    pixels = torch.randn(BATCH, 3, side, side)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": pixels,
    }


def sparse(model, setting):
    scheme = sparsify(model, **SETTINGS[setting], total_steps=10)
    scheme.begin_step(0)
    return scheme


def settings_of(metrics, trains):
    return {
        "batch": BATCH,
        "visual_tokens": metrics["visual_tokens"],
        "text_tokens": metrics["tokens"] - metrics["visual_tokens"],
        "answer_tokens": metrics["answer_tokens"],
        "trains": trains,
        "lora_rank": RANK,
    }


WAYS = [("sdpa", False), ("sdpa", True), ("eager", False)]  # attention, checkpointing
CASES = [
    *(("wide", trains, "dense", *way) for trains in TRAINED for way in WAYS[1:]),
    *(("long", trains, "vtc and lds", "sdpa", True) for trains in TRAINED),
    *(("long", "lora", setting, "sdpa", True) for setting in SETTINGS if setting != "vtc and lds"),
    *(
        pytest.param("deep", trains, setting, *way, marks=() if way[1] else pytest.mark.slow)
        for trains in ("align", "instruct")
        for setting in SETTINGS
        for way in WAYS
    ),
]


@pytest.mark.parametrize(("name", "trains", "setting", "attention", "checkpointing"), CASES)
def test_flops_agree_with_torch_within_one_percent(name, trains, setting, attention, checkpointing):
    model = build(name, TRAINED[trains], attention, checkpointing)
    scheme = sparse(model, setting)
    counter = FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU)
    with counter:
        model(**batch_for(model)).loss.backward()
    metrics = scheme.metrics()
    expected = step_flops(
        shape_of(model.config),
        **settings_of(metrics, TRAINED[trains]),
        work=metrics["work"],
        checkpointing=checkpointing,
        fused_attention=attention == "sdpa",
    )
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("trains", ["align", "instruct", "all"])
def test_flops_of_a_tower_without_a_class_token_agree_with_torch(trains):
    """SigLIP's, to which a Qwen2 is joined; its pooling head is not."""
    seen = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    said = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
    config = joined(
        SiglipVisionConfig(**seen, num_hidden_layers=3, image_size=48, patch_size=8),
        Qwen2Config(**said, num_hidden_layers=4, num_key_value_heads=2, vocab_size=512),
    )
    model, batch = random_model(config), made_up_batch(config, BATCH, TEXT, ANSWERS)
    freeze(model, TRAINED[trains])
    recompute(model, False)
    with sparsify(model) as scheme:
        scheme.begin_step(0)
        model(**batch)
    scheme = sparse(model, "vtc and lds")
    with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
        model(**batch).loss.backward()
    shape, metrics = shape_of(config), scheme.metrics()
    assert (shape.class_tokens, shape.patches, shape.visual_tokens) == (0, 36, 36)
    found = step_flops(shape, **settings_of(metrics, TRAINED[trains]), work=metrics["work"])
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01)


MODULES = {
    "vision": "model.vision_tower", "projector": "model.multi_modal_projector", "head": "lm_head",
}  # fmt: skip


@pytest.mark.parametrize("trains", TRAINED)
def test_every_part_has_its_own_flops(trains):
    model = build("wide", TRAINED[trains])
    scheme = sparse(model, "dense")
    with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
        model(**batch_for(model)).loss.backward()
    counted = {
        part: sum(counter.get_flop_counts()[f"{type(model).__name__}.{module}"].values())
        for part, module in MODULES.items()
    }
    counted["decoder"] = counter.get_total_flops() - sum(counted.values())
    settings = settings_of(scheme.metrics(), TRAINED[trains])
    assert flop_parts(shape_of(model.config), **settings) == pytest.approx(counted, rel=0.01)


SUBLAYERS = ("attention_backward", "mlp_backward")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("off", [*[(one,) for one in SUBLAYERS], SUBLAYERS])
@pytest.mark.parametrize("trains", ["align", "instruct", "lora and projector"])
def test_the_backward_of_attention_and_of_mlp_is_counted_apart(trains, off, checkpointing):
    """Off in every second layer. A layer with no backward at all is not computed again either."""
    parts = TRAINED[trains]
    model = build("wide", parts, checkpointing=checkpointing)
    scheme = sparsify(model, lds=LDS("dropbp", rate=0.5))
    scheme.begin_step(0)
    skipper = scheme.skipper
    skipper.remove_hooks()
    pieces = frozenset((layer, share) for layer in (0, 2, 4) for share in off)
    skipper.decision = Decision(scheme.decision.chances, pieces)
    skipper._hooked = {layer: skipper.decision_of(layer) for layer in (0, 2, 4)}
    for layer, part in skipper._hooked.items():
        skip_backward(skipper.layers[layer], part)
    with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
        model(**batch_for(model)).loss.backward()
    metrics = scheme.metrics()
    assert metrics["work"] == [dict.fromkeys(off, 0.0), {}] * 3
    shape = shape_of(model.config)
    given = settings_of(metrics, parts) | {"checkpointing": checkpointing}
    found = step_flops(shape, **given, work=metrics["work"])
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01)
    if len(off) == 1:  # so that the two are not to be confused
        other = [dict.fromkeys(set(SUBLAYERS) - set(off), 0.0), {}] * 3
        assert step_flops(shape, **given, work=other) != pytest.approx(found, rel=0.03)


def test_samples_that_a_layer_leaves_out_are_its_whole_saving():
    """Half the samples through every layer: the decoder's half, by torch's count and by ours."""
    model = build("deep")
    scheme = sparsify(model, lds=LDS("layerdrop", rate=2 / 3, unit="samples", draw="fixed_count"))
    scheme.begin_step(0)
    with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
        model(**batch_for(model)).loss.backward()
    metrics = scheme.metrics()
    assert metrics["work"] == [{"rows": pytest.approx(1 / 3)}] * 12
    given, shape = settings_of(metrics, INSTRUCT), shape_of(model.config)
    parts = flop_parts(shape, **given, work=metrics["work"])
    assert sum(parts.values()) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert parts["decoder"] == pytest.approx(flop_parts(shape, **given)["decoder"] / 3)


DENSE = {
    "batch": 2,
    "visual_tokens": 36,
    "text_tokens": 12,
    "answer_tokens": 2,
    "trains": INSTRUCT,
}


def test_vtc_and_lds_save_what_they_leave_out():
    shape = shape_of(build("wide").config)
    work = [{"rows": 0.0}, {}] * 3
    parts, half = flop_parts(shape, **DENSE), flop_parts(shape, **DENSE, work=work)
    assert half["decoder"] == pytest.approx(parts["decoder"] / 2)
    assert {k: half[k] for k in ("vision", "projector", "head")} == {
        k: parts[k] for k in ("vision", "projector", "head")
    }
    assert flop_parts(shape, **DENSE | {"visual_tokens": 9})["decoder"] < parts["decoder"] / 2
    text = flop_parts(shape, **DENSE | {"visual_tokens": 0})
    assert text["vision"] == text["projector"] == 0
    assert flop_parts(shape, **DENSE | {"images": 1})["vision"] == parts["vision"] / 2


def test_work_of_another_number_of_layers_is_an_error():
    with pytest.raises(ValueError, match="work of 5 layers: the shape has 6"):
        flop_parts(shape_of(build("wide").config), **DENSE, work=[{}] * 5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_parameters_are_those_of_the_model(name, tied):
    config = build(name).config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    model = LlavaForConditionalGeneration(config)

    def size(module):
        return sum(p.numel() for p in module.parameters())

    language = model.model.language_model
    head = size(language.embed_tokens) + size(language.norm) + (0 if tied else size(model.lm_head))
    assert shape_of(config).parameters == {
        "vision": size(model.model.vision_tower),
        "projector": size(model.model.multi_modal_projector),
        "decoder": size(language.layers),
        "head": head,
    }


@pytest.mark.parametrize("trains", TRAINED)
def test_trained_parameters_are_those_with_gradients(trains):
    model = build("wide", TRAINED[trains])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained_parameters(shape_of(model.config), TRAINED[trains], RANK) == trained


STORED = [
    *((name, trains, "dense") for name in ("long", "wide") for trains in TRAINED),
    *((name, trains, how) for name in ("long", "wide") for trains in ("align", "instruct")
      for how in ("layer", "vtc")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "trains", "setting"), STORED)
def test_activation_estimate_is_near_what_autograd_stores(name, trains, setting):
    parts = TRAINED[trains]
    model = build(name, parts)
    scheme = sparse(model, setting)
    total = stored_by(model, batch_for(model))
    metrics = scheme.metrics()
    settings = settings_of(metrics, parts) | {"layers_run": metrics["layers_run"]}
    memory = peak_memory(shape_of(model.config), **settings)
    assert 0.7 < memory["activations"] / total < 1.3


def stored_by(model, batch):
    """Bytes that a forward keeps for its backward."""
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stored = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            stored[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept: addresses stay unique
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(size for size, _ in stored.values())


def test_checkpointing_and_freezing_need_less_memory():
    shape, settings = shape_of(build("wide").config), DENSE | {"layers_run": 6}
    full = peak_memory(shape, **settings)
    assert peak_memory(shape, **settings, checkpointing=True)["activations"] < full["activations"]
    align = peak_memory(shape, **settings | {"trains": ALIGN})
    assert align["activations"] < full["activations"]
    assert align["optimizer"] == 12 * shape.parameters["projector"]
    assert align["weights"] == full["weights"]
    adapted = peak_memory(shape, **settings | {"trains": ("lora",), "lora_rank": RANK})
    assert adapted["optimizer"] == 3 * (adapted["weights"] - full["weights"])


# vision, projector, decoder, head, by the formulas of LLaVA alone that results were made with
RECORDED = [
    ("llava-1.5-7b", "align", False, True,
     [11075628269568, 1961726312448, 41996314321920, 130283470848]),
    ("llava-1.5-7b", "instruct", True, True,
     [11075628269568, 1961726312448, 76825213516800, 195425206272]),
    ("llava-1.5-7b", "lora", False, False,
     [11075628269568, 700616540160, 65690350387200, 130283470848]),
    ("llava-1.5-7b", "all", True, False,
     [40106698303488, 2101849620480, 123752554168320, 195425206272]),
]  # fmt: skip
SHARES = [
    {"rows": 0.5},
    {"tokens": 0.25},
    {"attention_backward": 0.0},
    {"mlp_backward": 0.5, "attention_backward": 0.25},
    {},
]


@pytest.mark.parametrize(("name", "trains", "checkpointing", "lean", "flops"), RECORDED)
def test_flops_of_llava_are_what_they_always_were(name, trains, checkpointing, lean, flops):
    shape = shape_of(known(name))
    found = flop_parts(
        shape, batch=32, visual_tokens=17.25, text_tokens=61.5, answer_tokens=7.75,
        trains=TRAINED[trains], lora_rank=8, images=29, checkpointing=checkpointing,
        work=[SHARES[layer % 5] for layer in range(shape.layers)] if lean else None,
    )  # fmt: skip
    assert list(found.values()) == pytest.approx(flops, rel=1e-12)


# ---- other families -----------------------------------------------------------------------------

FAMILIES = (
    "llava", "llava_next", "llava_onevision", "vipllava", "pixtral", "mistral3", "idefics3",
    "smolvlm", "internvl", "gemma3", "paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
    "qwen3_vl_moe",
)  # fmt: skip
EVERYDAY = ("llava_next", "pixtral", "smolvlm", "internvl", "gemma3", "qwen2_5_vl", "qwen3_vl")
ROWS = [["big", 5, 6, 7, 8, 9, 10, 11], ["small", 9, 10, 11], [3, "big", 4, 5], [12, 13, 14, 15]]
OTHERS = sorted({*ZOO} - {*FAMILIES, *REFUSED, *ROUGH})


def families(*cases):
    """Each of the families with each of the cases; those that are like another one are slow."""
    return [
        pytest.param(name, *case, marks=() if name in EVERYDAY else pytest.mark.slow)
        for name in FAMILIES
        for case in cases
    ]


def tiny(name, trains=INSTRUCT):
    """A tiny model of a type."""
    model = ZOO[name].build(torch.float32)
    if getattr(model.config.vision_config, "vision_use_head", False):
        model.config.vision_config.vision_use_head = False  # as in all that are published
        model = type(model)(model.config).train()
    freeze(model, [part for part in trains if part != "lora"])
    if "lora" in trains:
        add_adapters(model, LoraConfig(rank=RANK), seed=0)
    return model


def member(name, trains=INSTRUCT, checkpointing=False):
    """A tiny model of a type, and a batch."""
    model, batch = tiny(name, trains), batch_of(name, ROWS)
    recompute(model, checkpointing)
    with sparsify(model) as scheme:  # its forward is asked once what it sees, no part of it
        scheme.begin_step(0)
        model(**batch)
    return model, batch


def batch_of(name, rows):
    return {
        key: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in ZOO[name].batch(rows).items()
    }


def settings_for(model, batches, scheme, trains):
    """What `step_flops` is told of a step on `batches`."""
    config, metrics = model.config, scheme.metrics()
    work = [tower_work(config, shape_of(config), batch) for batch in batches]
    patches, pairs = map(sum, zip(*work, strict=True))
    return settings_of(metrics, trains) | {
        "batch": sum(len(batch["input_ids"]) for batch in batches),
        "patches": patches,
        "pairs": pairs,
        "work": metrics["work"],
    }


def counted(model, *batches):
    with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
        for batch in batches:
            model(**batch).loss.backward()
    return counter.get_total_flops()


def check(name, trains, setting, checkpointing):
    parts = TRAINED[trains]
    model, batch = member(name, parts, checkpointing)
    scheme = sparse(model, setting)
    flops = counted(model, batch)
    given = settings_for(model, [batch], scheme, parts)
    found = step_flops(shape_of(model.config), **given, checkpointing=checkpointing)
    assert found == pytest.approx(flops, rel=0.01)


STEPS = [
    ("all", "dense", True),
    ("instruct", "vtc and lds", False),
    ("lora", "backward", True),
    ("align", "tokens", False),
]


@pytest.mark.parametrize(("name", "trains", "setting", "checkpointing"), families(*STEPS))
def test_flops_of_a_family_agree_with_torch(name, trains, setting, checkpointing):
    check(name, trains, setting, checkpointing)


# Each family with a third of what can be trained, and each of that with a third of the families.
THIRDS = [
    (name, trains)
    for i, name in enumerate(FAMILIES)
    for j, trains in enumerate(TRAINED)
    if (i + j) % 3 == 0
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "trains"), THIRDS)
def test_flops_of_a_family_agree_with_torch_whatever_is_trained(name, trains):
    check(name, trains, "vtc and lds", checkpointing=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS[:2])
@pytest.mark.parametrize("name", OTHERS)
def test_flops_of_every_type_that_is_not_called_rough_agree_with_torch(name, case):
    trains, setting, checkpointing = case
    check(name, trains, "layer" if name in NO_VTC else setting, checkpointing)


def test_types_that_are_called_rough_are_carried_and_say_so(caplog):
    assert {*ZOO} - {*REFUSED} >= ROUGH
    shape = shape_of(ZOO["idefics2"].build().config)
    assert "FLOPs of model_type 'idefics2' are a rough figure" in caplog.text
    assert all(value > 0 for value in flop_parts(shape, **DENSE).values())


def tower_of(model):
    """The layers of the vision tower."""
    part_of = part_finder(model)
    return next(
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and part_of(name) == "vision_tower"
    )


@pytest.mark.parametrize("name", [case.values[0] for case in families(())])
def test_patches_are_what_the_tower_sees(name):
    model, batch = member(name)
    seen = []
    tower_of(model)[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args or [*kwargs.values()])[0].shape[:-1].numel()),
        with_kwargs=True,
    )
    model(**batch)
    shape = shape_of(model.config)
    patches, _ = tower_work(model.config, shape, batch)
    tiles = patches / shape.patches
    assert patches + tiles * shape.class_tokens == sum(seen) > 0


@pytest.mark.parametrize("name", ["idefics3", "qwen2_5_vl"])
def test_a_row_of_the_history_knows_the_flops_of_its_micro_batches(name):
    """Of unlike sizes, with several pictures and none in a row."""
    model, batch = member(name)
    other = batch_of(name, [["big", 5, "small", 6, 7], [8, 9, 10], ["small", 4, 5, 6]])
    scheme = sparse(model, "vtc and lds")
    flops = counted(model, batch, other)
    has_image = [True, True, True, False, True, False, True]
    few = {"steps": 1, "batch_size": 4, "split": "instruct", "trains": [*INSTRUCT]}
    block = StageConfig(**RECIPE | few)
    row = measure(scheme, shape_of(model.config), block, has_image, [batch, other])
    # both micro-batches count as if they were as long as their mean
    assert row["flops"] == pytest.approx(flops, rel=0.02)


@pytest.mark.parametrize(("name",), families(()))
def test_parameters_of_a_family_are_those_of_the_model(name):
    for trains in (("projector",), ("language_model",), ("vision_tower",), ("lora",)):
        model = tiny(name, trains)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained_parameters(shape_of(model.config), trains, RANK) == trained
    whole = tiny(name)
    assert sum(shape_of(whole.config).parameters.values()) == whole.num_parameters()


@pytest.mark.parametrize(("name", "trains"), families(("instruct",), ("all",)))
def test_memory_of_a_family_is_within_half_and_twice(name, trains):
    parts = TRAINED[trains]
    model, batch = member(name, parts)
    scheme = sparse(model, "dense")
    held = stored_by(model, batch)
    given = settings_for(model, [batch], scheme, parts)
    del given["pairs"], given["work"]
    memory = peak_memory(shape_of(model.config), **given, layers_run=len(scheme.metrics()["work"]))
    assert 0.5 < memory["activations"] / held < 2


@pytest.mark.parametrize(("function", "more"), [(step_flops, {}), (peak_memory, {"layers_run": 1})])
@pytest.mark.parametrize(
    ("trains", "said"),
    [
        (["projector", "head"], r"trains=\['projector', 'head'\].*vision_tower, lora"),
        ([], r"trains=\[\]: expected one or more"),
        (["lora"], "lora_rank=0: expected at least 1"),
    ],
)
def test_parts_that_can_not_be_trained_are_an_error(function, more, trains, said):
    with pytest.raises(ValueError, match=said):
        function(shape_of(build("long").config), **DENSE | {"trains": trains} | more)


def test_needs_no_torch():
    code = "import sys, sts.pipeline.cost.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
