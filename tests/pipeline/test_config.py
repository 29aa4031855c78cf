"""What a scale file and an ablation may say, and what one is told who says something else."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, get_args

import pytest
import yaml
from pydantic import BaseModel, create_model

from sts import LDS, STS_LDS, STS_VTC, VTC
from sts.checks import interval
from sts.pipeline.config import (
    ALWAYS,
    BACKBONE,
    Config,
    ConfigError,
    CustomConfig,
    Neutral,
    StageConfig,
    config_hash,
    deep_merge,
    dump,
    identity,
    load_ablations,
    load_scale,
    load_yaml,
    resolve,
)
from sts.settings import setting

ROOT = Path(__file__).resolve().parents[2]
SCALES = sorted(
    {*(ROOT / "workflow/config").glob("*.yaml")} - {ROOT / "workflow/config/search.yaml"}
)
ABLATIONS = ROOT / "workflow/ablations.yaml"
PAGE = ROOT / "docs/ablations.md"


@pytest.fixture(scope="module")
def mini() -> Config:
    return load_scale(ROOT / "workflow/config/mini.yaml")


def entry(tmp_path: Path, overrides: str, label: str = "label: Mine") -> Path:
    """An ablation table with the baseline and one entry `mine`."""
    file = tmp_path / "ablations.yaml"
    file.write_text(f"dense: {{label: Dense}}\nmine:\n  {label}\n  overrides: {overrides}\n")
    return file


def resolved(tmp_path: Path, scale: Config, overrides: str) -> Config:
    return resolve(scale, load_ablations(entry(tmp_path, overrides))["mine"])


# ---- what is accepted ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES, ids=lambda path: path.stem)
def test_every_ablation_is_valid_on_every_scale(scale):
    config = load_scale(scale)
    for ablation in load_ablations(ABLATIONS).values():
        assert resolve(config, ablation).scale == scale.stem


@pytest.mark.parametrize("scale", SCALES, ids=lambda path: path.stem)
def test_a_resolved_configuration_reads_back_as_it_was_written(scale, tmp_path):
    config = load_scale(scale)
    (tmp_path / "resolved.yaml").write_text(dump(config))
    assert load_scale(tmp_path / "resolved.yaml") == config


def test_a_folder_whose_name_looks_like_a_number_reads_back(mini, tmp_path):
    data = mini.data.model_copy(update={"folders": {"nlvr": "1e3"}})
    config = mini.model_copy(update={"data": data})
    (tmp_path / "resolved.yaml").write_text(dump(config))
    assert load_scale(tmp_path / "resolved.yaml") == config


def test_the_mini_scale_repeats_no_default(mini):
    """So that a default can't drift from it: what it says differs from the blocks', or has none."""

    def repeated(block: BaseModel, content: dict) -> list[str]:
        return [
            name
            for name, value in content.items()
            if value == type(block).model_fields[name].get_default()
        ]

    content = load_yaml(ROOT / "workflow/config/mini.yaml")
    for name, stage in content.pop("stages").items():
        assert repeated(mini.stage(name), stage) == []
    assert content.pop("scale") == "mini"
    for name, block in content.items():
        assert repeated(getattr(mini, name), block) == []


def test_the_paper_scale_is_the_recipe_of_llava(mini):
    paper = load_scale(ROOT / "workflow/config/paper.yaml")
    align, instruct = paper.stages["align"], paper.stages["instruct"]
    assert align.batch_size * align.gradient_accumulation_steps * align.processes == 256
    assert instruct.batch_size * instruct.gradient_accumulation_steps * instruct.processes == 128
    assert (align.lr, instruct.lr) == (1e-3, 2e-5)
    assert (align.trains, instruct.trains) == (["projector"], ["projector", "language_model"])
    assert (align.template, instruct.template, paper.model.template) == ("plain", None, "v1")
    assert paper.model.image_aspect_ratio == "pad" and paper.model.vision_feature_layer == -2
    assert (align.group_by_length, instruct.group_by_length) == (False, True)
    assert instruct.sorted_batches == 1
    for block in (align, instruct):
        assert (block.warmup_ratio, block.weight_decay, block.max_grad_norm) == (0.03, 0, 1)
        assert (block.precision, block.gradient_checkpointing) == ("bf16", True)
        assert block.max_length == 2048
    assert (align.data, instruct.data) == (["llava_pretrain"], ["llava_mix665k"])


def test_an_override_changes_its_leaf_only(tmp_path, mini):
    config = resolved(tmp_path, mini, "{align: {vtc: {kind: avgpool2d, keep: 0.25}}}")
    assert (config.stages["align"].vtc.kind, config.stages["align"].vtc.keep) == ("avgpool2d", 0.25)
    assert config.stages["align"].vtc.schedule == mini.stages["align"].vtc.schedule
    assert (config.stages["instruct"], config.data) == (mini.stages["instruct"], mini.data)


SLOPED = "{align: {lds: {policy: sts, rate: 0.6, epsilon: 0.5, protect_first: 1, dense_tail: 0.1}}}"


def test_naming_a_policy_starts_from_its_parts_and_not_from_the_scales(tmp_path, mini):
    """A scale that skips by the formula: its epsilon, its rate and its parts are of its policy."""
    scale = resolved(tmp_path, mini, SLOPED)
    other = resolved(tmp_path, scale, "{align: {lds: {policy: random_ltd, rate: 0.5}}}")
    assert other.stages["align"].lds == LDS("random_ltd", rate=0.5)
    assert resolved(tmp_path, scale, "{align: {lds: {policy: none}}}").stages["align"].lds == LDS()
    assert other.stages["instruct"] == scale.stages["instruct"]


def test_naming_no_policy_changes_its_leaf_only(tmp_path, mini):
    scale = resolved(tmp_path, mini, SLOPED)
    other = resolved(tmp_path, scale, "{align: {lds: {draw: fixed_count, schedule: constant}}}")
    parts = asdict(scale.stages["align"].lds) | {"draw": "fixed_count", "schedule": "constant"}
    assert asdict(other.stages["align"].lds) == parts


def test_a_part_that_is_given_takes_the_place_of_the_policys(tmp_path, mini):
    config = resolved(tmp_path, mini, "{align: {lds: {policy: layerskip, rate: 0.5, unit: layer}}}")
    assert config.stages["align"].lds == LDS("layerskip", rate=0.5, unit="layer")
    assert config.stages["align"].lds.depth == "exponential"


def test_an_ablation_may_have_its_own_seeds(tmp_path, mini):
    file = entry(tmp_path, "{}", label="label: Mine\n  seeds: [7]")
    assert resolve(mini, load_ablations(file)["mine"]).seeds == [7]


def test_scientific_notation_without_a_dot_is_a_number(tmp_path, mini):
    overrides = "{align: {lr: 5e-4, lds: {policy: layerdrop, rate: 1e-1}}}"
    block = resolved(tmp_path, mini, overrides).stages["align"]
    assert (block.lr, block.lds.rate) == (5e-4, 0.1)


def test_a_real_data_set_is_evaluated_on_its_own_test_split(tmp_path, mini):
    config = resolved(tmp_path, mini, "{evaluate: {benchmarks: [nlvr, colour, text]}}")
    assert config.evaluation_data() == ["nlvr", "scenes"]


RECIPE = (
    "{data: [scenes], steps: 4, batch_size: 8, processes: 1, parallel: ddp, lr: 1.0e-3, "
    "precision: bf16, gradient_checkpointing: false}"
)


# ---- what is not --------------------------------------------------------------------------------

WRONG = {
    "unknown key": ("{align: {stpes: 3}}", "align.stpes", "template, steps"),
    "unknown key, deep": ("{align: {vtc: {kep: 0.5}}}", "align.vtc.kep", "kind, keep"),
    "text for a number": ("{align: {steps: many}}", "align.steps", "a whole number at least 1"),
    "fraction for a whole number": ("{align: {steps: 1.5}}", "align.steps", "a whole number"),
    "number for yes or no": ("{align: {group_by_length: 1}}", "group_by_length", "true or false"),
    "true for a number": ("{align: {steps: true}}", "align.steps", "a whole number"),
    "text for a list": ("{align: {data: scenes}}", "align.data", "a list"),
    "text for a mapping": ("{align: {vtc: avgpool2d}}", "align.vtc", "a mapping"),
    "number for a mapping": ("{align: {vtc: 3}}", "align.vtc", "a mapping with the keys kind"),
    "unknown key of lds": ("{align: {lds: {exact: true}}}", "align.lds.exact", "rescale, explore"),
    "keep of 0": ("{align: {vtc: {kind: random, keep: 0}}}", "align.vtc.keep", "in (0, 1]"),
    "keep above 1": ("{align: {vtc: {kind: random, keep: 1.5}}}", "align.vtc.keep", "in (0, 1]"),
    "keep that is text": ("{align: {vtc: {kind: random, keep: a}}}", "align.vtc.keep", "a number"),
    "keep without a kind": ("{align: {vtc: {keep: 0.5}}}", "align.vtc.keep", "kind is none"),
    "unknown compressor": ("{align: {vtc: {kind: jpeg}}}", "align.vtc.kind", "uniform, random"),
    "schedule of older versions": (
        "{align: {vtc: {kind: random, keep: 0.5, schedule: linear}}}", "align.vtc.schedule",
        "rising_linear",
    ),
    "rate above 1": (
        "{instruct: {lds: {policy: sts, rate: 1.5}}}", "instruct.lds.rate", "a number in [0, 1]",
    ),
    "a chance above 1": (
        "{instruct: {lds: {policy: sts, rate: 0.9, epsilon: 0.5}}}", "instruct.lds.rate",
        "at most 0.666",
    ),
    "rate that leaves no layer": (
        "{align: {lds: {policy: layerdrop, rate: 0.95}}}",
        "align.lds.rate", "at most 0.916, so that one of 12 layers always runs",
    ),
    "all layers protected": (
        "{instruct: {lds: {policy: layerdrop, rate: 0.5, protect_first: 12}}}",
        "instruct.lds.protect_first", "fewer than the 12 layers",
    ),
    "more layers protected than there are": (
        "{instruct: {lds: {protect_last: 13}}}", "instruct.lds.protect_last", "at most 12 layers",
    ),
    "rate without a policy": ("{align: {lds: {rate: 0.5}}}", "align.lds.rate", "policy is none"),
    "unknown policy": ("{align: {lds: {policy: luck}}}", "align.lds.policy", "sts, layerdrop"),
    "a policy's older name": ("{align: {lds: {policy: need}}}", "align.lds.policy", "block_influ"),
    "unknown depth": ("{align: {lds: {depth: deep}}}", "align.lds.depth", "uniform, slope"),
    "unknown unit": ("{align: {lds: {unit: head}}}", "align.lds.unit", "layer, samples, tokens"),
    "a draw that the unit can't take": (
        "{align: {lds: {policy: random_ltd, rate: 0.5, draw: independent}}}", "align.lds.draw",
        "fixed_count for unit 'tokens'",
    ),
    "a unit that can't be rescaled": (
        "{align: {lds: {policy: dropbp, rate: 0.5, rescale: true}}}", "align.lds.rescale", "false",
    ),
    "epsilon too steep": ("{align: {lds: {epsilon: 2}}}", "align.lds.epsilon", "in [-1, 1]"),
    "unknown clock": ("{align: {lds: {clock: hours}}}", "align.lds.clock", "steps, epochs"),
    "part of a layer": ("{align: {lds: {protect_first: 0.5}}}", "protect_first", "0 or more"),
    "unknown data set": ("{align: {data: [coco]}}", "align.data", "easy_vqa, llava_mix665k"),
    "unknown benchmark": ("{evaluate: {benchmarks: [mme]}}", "evaluate.benchmarks", "chart"),
    "unknown precision": ("{align: {precision: fp8}}", "align.precision", "'fp32' or 'bf16'"),
    "a stage that there is not": ("{modell: {steps: 4}}", "modell", "trains, data, batch_size"),
    "no part to train": ("{align: {trains: []}}", "align.trains", "at least one"),
    "a part that there is not": ("{align: {trains: [head]}}", "align.trains.0", "'projector'"),
    "processes that the nodes can't share evenly": (
        "{align: {processes: 3, nodes: 2}}", "align.nodes", "a divisor of its processes, 3",
    ),
    "a part twice": ("{align: {trains: [lora, lora]}}", "align.trains", "each once"),
    "adapters beside what they adapt": (
        "{align: {trains: [lora, language_model]}}", "align.trains", "lora or language_model",
    ),
    "a rate for some parts": (
        "{align: {lr: {vision_tower: 1e-3}}}", "align.lr", "one for each of projector",
    ),
    "a rate of 0": ("{align: {lr: 0}}", "align.lr", "greater than 0"),
    "no start": ("{align: {init: luck}}", "align.init", "one of backbone, instruct"),
    "one start for two": ("{align: {init: backbone}, instruct: {init: backbone}}", "instruct.init",
        "another: align comes right after it"),
    "stages in a circle": (
        "{align: {init: instruct}, instruct: {init: align}}", "align.init", "does not come after",
    ),
    "a split that can't be told": (
        f"{{warm: {{trains: [projector], {RECIPE[1:]}}}", "warm.split", "one of align, instruct",
    ),
    "like a stage that there is not": ("{warm: {like: tune}}", "warm.like", "one of align, inst"),
    "like no stage's name": ("{warm: {like: [align]}}", "warm.like", "one of align, instruct"),
    "like in a circle": ("{a: {like: b}, b: {like: a}}", "like", "a stage that is not like this"),
    "like, of a stage that has values": ("{align: {like: instruct}}", "align.like", "null: it is"),
    "a whole model that is none": ("{model: {family: whole}}", "model.checkpoint", "folder"),
    "a checkpoint to join": ("{model: {checkpoint: a/b}}", "model.checkpoint", "null where"),
    "fresh parts to join": ("{model: {fresh: [projector]}}", "model.fresh", "[] where"),
    "a family that there is not": ("{model: {family: vit}}", "model.family", "'joined' or 'whole'"),
    "no stage at all": ("{align: null, instruct: null}", "stages", "at least one"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_an_error_names_file_entry_key_value_and_what_is_accepted(tmp_path, mini, case):
    overrides, key, accepted = WRONG[case]
    with pytest.raises(ConfigError) as error:
        resolved(tmp_path, mini, overrides)
    output, accepts = str(error.value).split(" is not accepted. Accepted: ")
    assert output.startswith(f"{tmp_path / 'ablations.yaml'}: mine.")
    assert output.endswith(f": {error.value.value!r}")
    assert key in output
    assert accepted in accepts


def test_a_row_is_relative_to_one_that_there_is(tmp_path):
    file = tmp_path / "ablations.yaml"
    file.write_text("dense: {label: a}\nsts: {label: b, relative_to: dens}\n")
    with pytest.raises(ConfigError, match=r"sts\.relative_to: 'dens'.* dense, sts"):
        load_ablations(file)


def test_two_ablations_with_one_id(tmp_path):
    file = tmp_path / "ablations.yaml"
    file.write_text("dense: {label: Dense}\nmine: {label: A}\n\nmine: {label: B}\n")
    with pytest.raises(ConfigError, match="mine: 'given twice, in lines 2 and 4'"):
        load_ablations(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Mine-1: {label: x}", "lower case"),
        ("mine: {}", "label"),
        ("mine: {label: x, groups: [Best]}", "lower case"),
        ("mine: {label: x, group: [main]}", "groups, label"),
        ("mine: {label: x, source: theirs}", "'baseline', 'paper', 'ours' or 'peers'"),
        ("mine: 3", "mapping"),
    ],
)
def test_a_malformed_entry(tmp_path, text, message):
    file = tmp_path / "ablations.yaml"
    file.write_text(f"dense: {{label: Dense}}\n{text}\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_ablations(file)


def test_the_first_entry_is_the_baseline_without_overrides(tmp_path):
    file = tmp_path / "ablations.yaml"
    file.write_text("mine:\n  label: x\n  overrides: {align: {steps: 3}}\n")
    with pytest.raises(ConfigError, match="the first is the baseline"):
        load_ablations(file)


def test_a_share_of_the_steps_scales_both_stages_but_never_the_baseline(tmp_path, mini):
    file = tmp_path / "ablations.yaml"
    file.write_text("dense: {label: Dense}\nhalf: {label: x, steps_share: 0.5}\n")
    half = resolve(mini, load_ablations(file)["half"])
    assert half.stages["align"].steps == mini.stages["align"].steps // 2
    assert half.stages["instruct"].steps == mini.stages["instruct"].steps // 2
    file.write_text("dense: {label: Dense, steps_share: 0.5}\n")
    with pytest.raises(ConfigError, match=r"dense\.steps_share"):
        load_ablations(file)
    file.write_text("dense: {label: Dense}\nnone: {label: x, steps_share: 0}\n")
    with pytest.raises(ConfigError, match=r"none\.steps_share: 0 .* greater than 0"):
        load_ablations(file)


def test_an_ablation_with_a_share_of_the_samples_passes_over_them_as_often(tmp_path, mini):
    def steps(override: str) -> int:
        return resolved(tmp_path, mini, f"{{instruct: {override}}}").stages["instruct"].steps

    whole = mini.stages["instruct"].steps
    assert steps("{samples: 0.5}") == whole // 2
    assert steps("{samples: 0.5, steps: 7}") == 7
    with pytest.raises(ConfigError, match=r"samples: 1\.5 is not accepted"):
        steps("{samples: 1.5}")
    with pytest.raises(ConfigError, match=r"scenes has 3\b"):  # fewer than a step takes
        steps("{samples: 0.001}")


def test_a_whole_checkpoint_is_one_entry_of_a_scale_or_an_ablation(tmp_path, mini):
    file = tmp_path / "scale.yaml"
    file.write_text("model: {family: whole, checkpoint: some/folder}\n")
    assert load_scale(file).model.checkpoint == "some/folder"
    model = resolved(tmp_path, mini, "{model: {family: whole, checkpoint: a/b}}").model
    assert (model.family, model.checkpoint) == ("whole", "a/b")
    assert mini.model.family == "joined"


def test_a_pretrained_model_needs_both_parts(tmp_path):
    file = tmp_path / "scale.yaml"
    file.write_text("model: {backbone: pretrained, vision: openai/clip}\n")
    with pytest.raises(ConfigError, match=r"model\.language: None"):
        load_scale(file)


def test_a_custom_data_set_trains_the_stage_that_it_is_for(tmp_path):
    file = tmp_path / "scale.yaml"
    file.write_text(
        "data: {custom: {own: {json: a.json, images: i, split: align}}}\n"
        "stages: {instruct: {data: [own]}}\n"
    )
    with pytest.raises(ConfigError, match=r"data\.custom\.own\.split"):
        load_scale(file)


# ---- what else must hold ------------------------------------------------------------------------


def blocks(kind: object = Config) -> set[type[BaseModel]]:
    """The blocks of a configuration, wherever they stand."""
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return {block for inner in get_args(kind) for block in blocks(inner)}
    return {kind}.union(*(blocks(field.annotation) for field in kind.model_fields.values()))


def test_every_field_is_described():
    assert {CustomConfig, StageConfig} < blocks()
    for block in blocks():
        for name, info in block.model_fields.items():
            assert info.description, f"{block.__name__}.{name}"


# ---- stages -------------------------------------------------------------------------------------


def test_a_stage_more_or_fewer_is_one_entry(tmp_path, mini):
    def names(overrides: str) -> list[str]:
        return list(resolved(tmp_path, mini, overrides).stages)

    warm = "{init: align, like: align, trains: [vision_tower], split: instruct}"
    assert names("{}") == ["align", "instruct"]
    assert names("{align: null}") == ["instruct"]
    assert names(f"{{warm: {warm}}}") == ["align", "warm", "instruct"]
    assert names("{late: {like: instruct, trains: [lora], lr: 1e-3}}") == [
        "align",
        "instruct",
        "late",
    ]
    config = resolved(tmp_path, mini, f"{{warm: {warm}}}")
    assert config.before("warm") == "align" and config.before("align") == BACKBONE
    assert config.before("instruct") == "warm" and config.last == "instruct"
    assert config.stages["instruct"] == mini.stages["instruct"]


@pytest.mark.parametrize(
    "overrides",
    [
        "{align: null}",
        "{warm: {init: backbone, like: align}}",
        "{warm: {init: align, like: align, split: instruct}, align: {lr: {projector: 0.1}}}",
    ],
)
def test_other_stages_read_back_as_they_were_written(tmp_path, mini, overrides):
    """A job reads its resolved configuration as a scale file, on top of the mini scale."""
    config = resolved(tmp_path, mini, overrides)
    (tmp_path / "resolved.yaml").write_text(dump(config))
    again = load_scale(tmp_path / "resolved.yaml")
    assert again == config and list(again.stages) == list(config.stages)


def test_an_ablation_of_a_stage_that_the_scale_took_out_is_the_scales_own_run(tmp_path):
    file = tmp_path / "scale.yaml"
    file.write_text("stages: {align: null}\n")
    scale = load_scale(file)
    assert list(scale.stages) == ["instruct"]
    assert resolved(tmp_path, scale, "{align: {vtc: {kind: random, keep: 0.5}}}") == scale


UNFROZEN = """
stages:
  unfrozen:
    {}
    trains: [projector, language_model, vision_tower]
    split: instruct
    steps: 100
    batch_size: 16
    lr: {{projector: 2.0e-5, language_model: 2.0e-5, vision_tower: 2.0e-6}}
"""


@pytest.mark.parametrize("scale", SCALES, ids=lambda path: path.stem)
def test_a_new_stage_is_like_another_or_says_its_recipe(tmp_path, scale):
    """What a recipe decides never comes from a default, against the other stages of its scale."""
    file = tmp_path / "scale.yaml"

    def load(line: str) -> Config:
        file.write_text(
            yaml.safe_dump(deep_merge(load_yaml(scale), yaml.safe_load(UNFROZEN.format(line))))
        )
        return load_scale(file)

    with pytest.raises(ConfigError) as error:
        load("")
    assert error.value.key == "stages.unfrozen"
    missing = "data, processes, parallel, precision, gradient_checkpointing"
    assert error.value.accepted == (
        f"{missing} beside these, or `like`, a stage to take them from: align or instruct"
    )
    config = load("like: instruct")
    stage, other = config.stage("unfrozen"), config.stage("instruct")
    own = {"trains", "steps", "batch_size", "lr"}
    assert (stage.steps, stage.batch_size) == (100, 16) and "vision_tower" in stage.trains
    assert {k: v for k, v in stage if k not in own} == {k: v for k, v in other if k not in own}


def test_like_takes_all_but_the_place_also_what_acts(tmp_path, mini):
    """Of the other stage as the ablation has it; a policy of its own starts from its own parts."""
    lds = "{policy: sts, rate: 0.5, epsilon: 1, protect_first: 2}"
    start = f"instruct: {{init: align, steps: 7, lds: {lds}}}"
    config = resolved(
        tmp_path, mini, f"{{{start}, b: {{like: a, steps: 9}}, a: {{like: instruct}}}}"
    )
    assert list(config.stages) == ["align", "instruct", "b", "a"]
    assert config.stages["a"] == config.stages["instruct"] and config.stages["b"].steps == 9
    other = f"{{{start}, a: {{like: instruct, lds: {{policy: random_ltd, rate: 0.5}}}}}}"
    assert resolved(tmp_path, mini, other).stages["a"].lds == LDS("random_ltd", rate=0.5)


def test_like_is_of_a_new_stage(tmp_path):
    file = tmp_path / "scale.yaml"
    file.write_text("stages: {align: {like: instruct}}\n")
    with pytest.raises(ConfigError, match=r"stages\.align\.like: 'instruct' .* of a new stage"):
        load_scale(file)


# ---- what a result depends on -------------------------------------------------------------------


def test_weights_depend_on_all_of_a_stage_but_how_often_it_is_saved(mini):
    stage = mini.stages["align"]
    saved = stage.model_copy(update={"checkpoint_every": 7})
    assert saved.identity() == stage.identity()
    assert stage.model_copy(update={"lr": 0.5}).identity() != stage.identity()


def test_what_is_idle_does_not_count_and_what_acts_does(tmp_path, mini):
    def values(overrides: str) -> dict:
        return resolved(tmp_path, mini, overrides).stages["align"].identity()

    idle = ["{}", "{align: {vtc: {positions: mean}}}", "{align: {lora: {rank: 8}}}",
            "{align: {lds: {policy: layerdrop, rate: 0.0}}}"]  # fmt: skip
    assert all(values(overrides) == values("{}") for overrides in idle)
    acts = ["{align: {vtc: {kind: random, keep: 0.5}}}", "{align: {trains: [lora]}}",
            "{align: {vtc: {kind: random, keep: 0.5, positions: mean}}}",
            "{align: {lds: {policy: layerdrop, rate: 0.1}}}"]  # fmt: skip
    assert len({str(values(overrides)) for overrides in [*acts, "{}"]}) == len(acts) + 1


def test_a_whole_number_is_the_same_value_with_and_without_a_dot(tmp_path, mini):
    """As the stage's key is a hash of JSON, which tells 1 and 1.0 apart."""
    overrides = "{{align: {{max_grad_norm: {0}, vtc: {{kind: random, keep: 0.5}}, lds: {lds}}}}}"
    lds = "{{policy: sts, rate: 0.5, epsilon: {0}}}"
    keys = {
        config_hash(
            resolved(tmp_path, mini, overrides.format(text, lds=lds.format(text)))
            .stages["align"]
            .identity()
        )
        for text in ("1", "1.0", "1e0")
    }
    assert len(keys) == 1


def test_a_new_key_at_its_neutral_value_changes_no_identity_and_a_changed_default_does(mini):
    class More(StageConfig):
        ema: Annotated[float, Neutral(0.0)] = 0.0

    class Other(StageConfig):
        ema: Annotated[float, Neutral(0.0)] = 0.9

    stage = mini.stages["align"]
    values = dict(stage)
    assert More(**values).identity() == stage.identity()
    assert More(**values, ema=0.9).identity() != stage.identity()
    assert Other(**values).identity() == More(**values, ema=0.9).identity()


@dataclass(frozen=True)
class MoreVTC(VTC):
    temperature: float = setting(1.0, interval(0, 2), "Heat", neutral=True)


def test_so_does_a_new_setting_of_the_library():
    assert identity(MoreVTC("random", 0.5)) == identity(VTC("random", 0.5))
    assert identity(MoreVTC("random", 0.5, temperature=2.0))["temperature"] == 2.0


def test_every_neutral_value_is_one_that_the_key_takes():
    for block in blocks():
        for name, info in block.model_fields.items():
            for mark in info.metadata:
                if isinstance(mark, Neutral) and mark.value is not ALWAYS:
                    only = create_model("Only", key=(info.rebuild_annotation(), mark.value))
                    assert only(key=mark.value).key == mark.value, name


def test_every_ablation_says_whose_method_it_is():
    """The paper's are of its kinds and its formula, peers' of none of these."""
    ablations = load_ablations(ABLATIONS)
    assert next(iter(ablations.values())).source == "baseline"
    papers = {"uniform", "random", "text_guided", "sts"}
    for id, ablation in ablations.items():
        named = {
            block[part][key]
            for block in filter(None, ablation.overrides.values())
            for part, key in (("vtc", "kind"), ("lds", "policy"))
            if part in block
        }
        if ablation.source == "baseline":
            assert not named, id
        elif ablation.source:  # which a user may leave out
            assert named, id
        if ablation.source == "paper":
            assert named <= papers, id
        if ablation.source == "peers":
            assert not named & papers, id


def test_row_sts_has_the_default_values_of_the_library(mini):
    stages = resolve(mini, load_ablations(ABLATIONS)["sts"]).stages
    assert (stages["align"].vtc, stages["align"].lds) == (STS_VTC, LDS())
    assert (stages["instruct"].vtc, stages["instruct"].lds) == (VTC(), STS_LDS)


def test_the_page_on_ablations_does_what_it_says(tmp_path, mini):
    """The entry that the page shows is added to the table as the page says, and is a valid run."""
    example = re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    (id,) = yaml.safe_load(example)
    file = tmp_path / "ablations.yaml"
    table = ABLATIONS.read_text()
    file.write_text(table if id in load_ablations(ABLATIONS) else f"{table}\n{example}")
    config = resolve(mini, load_ablations(file)[id])
    assert config != mini
    code = "".join(file.read_text() for file in (ROOT / "sts/pipeline/config").glob("*.py"))
    for word in re.findall(r"`(\w+)`", PAGE.read_text().partition("## Accepted values")[2]):
        assert word in code + ABLATIONS.read_text(), word
