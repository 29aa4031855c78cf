"""Every value of a configuration spoilt in type, range, unit or name is refused, by file and key.

What a schema refuses is drawn from the schema, leaf by leaf; what takes more than one key to see is
a table. A value that is merely huge is named by the estimate.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from sts.pipeline.config import (
    MINI,
    Ablation,
    ConfigError,
    deep_merge,
    load_ablations,
    load_scale,
    load_yaml,
    resolve,
    validate,
)
from sts.pipeline.config.schemas import schemas
from sts.pipeline.cost.machines import Machine
from sts.pipeline.measure.forecast import forecast
from sts.pipeline.plan import Plan, make_plan

ROOT = Path(__file__).resolve().parents[2]
BASE = load_yaml(MINI)
GPU = Machine("rtx4090", 1)
SCALE, ABLATIONS = (schemas()[f"{name}.schema.json"] for name in ("scale", "ablations"))
NAMES = {  # where names are the user's: some that are right
    "stages": ("align",), "data.custom": ("mine",), "data.rows": ("scenes",),
    "data.folders": ("nlvr",), "evaluate.metrics": ("existence",), "overrides": (),
}  # fmt: skip
BESIDE = {"stages.align.vtc": {"kind": "random"}, "stages.align.lds": {"policy": "layerdrop"}}


def leaves(schema: dict, defs: dict, path: str = "") -> Iterator[tuple[str, Draft202012Validator]]:
    """(key, what it accepts) of everything that has no keys of its own."""
    inner = next((s for s in schema.get("anyOf", ()) if "$ref" in s), schema)
    if "$ref" in inner:
        inner = defs[inner["$ref"].rpartition("/")[2]]
    blocks = {f"{path}.{name}".strip("."): of for name, of in inner.get("properties", {}).items()}
    if path in NAMES:
        of_name = inner.get("patternProperties", {"": inner.get("additionalProperties")})
        blocks = dict.fromkeys((f"{path}.{name}" for name in NAMES[path]), *of_name.values())
    for name, block in blocks.items():
        yield from leaves(block, defs, name)
    if not blocks and path not in NAMES:
        yield path, Draft202012Validator({**schema, "$defs": defs})


LEAVES = dict(leaves(SCALE, SCALE["$defs"]))
OF_ENTRY = dict(leaves(ABLATIONS["additionalProperties"], ABLATIONS["$defs"]))
PROBES = [
    None, True, False, "", "x", "1", [], [[]], ["x"], {}, {"x": 1}, {1: 1}, -1, 0, 0.5, 1.5, -1e-9,
    10**12, 1e308, math.inf, -math.inf, math.nan,
]  # fmt: skip
NUMBERS = st.integers() | st.floats()
TEXTS = st.text(st.sampled_from("a0_-./é\n\0"))
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)


def wrong(accepts: Draft202012Validator, value: Any) -> bool:
    """Whether a value is none that a key accepts alone."""
    is_finite = not isinstance(value, float) or math.isfinite(value)
    has_names = not isinstance(value, dict) or all(isinstance(key, str) for key in value)
    return not (is_finite and has_names and accepts.is_valid(value))


def nested(path: str, value: Any) -> dict:
    """A mapping with a value at a key; the value itself at none."""
    for name in reversed(path.split(".") if path else []):
        value = {name: value}
    return value


def refused(path: str, value: Any, *doors: Any) -> ConfigError:
    """How each door refuses a content: an error that names file and key."""
    for door in doors:
        with pytest.raises(ConfigError) as error:
            door(path, value)
        assert str(error.value).startswith("spoilt.yaml: ")
        assert path.removeprefix("stages.") in error.value.key, (path, value, error.value.key)
    return error.value


def as_scale(path: str, value: Any) -> None:
    """In a scale."""
    parent = path.rpartition(".")[0]
    content = nested(parent, BESIDE[parent]) if parent in BESIDE else {}
    content = deep_merge(content, {"data": {"custom": {"mine": {"hub": "a/b"}}}})
    validate(deep_merge(deep_merge(BASE, content), nested(path, value)), "spoilt.yaml")


MINI_SCALE = load_scale(MINI)


def as_override(path: str, value: Any) -> None:
    """In an ablation of a scale that is right."""
    parent = path.rpartition(".")[0]
    beside = nested(parent, BESIDE[parent]) if parent in BESIDE else {}
    content = deep_merge(beside, nested(path, value))
    overrides = content.pop("stages", {}) | content
    resolve(MINI_SCALE, Ablation(id="a", file="spoilt.yaml", label="A", overrides=overrides))


def as_plan(path: str, value: Any) -> Plan:
    """In a scale, up to its plan, which looks at what is on this machine."""
    scale = validate(deep_merge(BASE, nested(path, value)), "spoilt.yaml")
    dense = Ablation(id="dense", file="x", label="Dense", groups=["main"])
    return make_plan(scale, {"dense": dense}, "spoilt.yaml")


def as_entry(path: str, value: Any) -> None:
    """In a table of ablations, up to the plan."""
    dense, entry = {"label": "Dense", "groups": ["main"]}, {"label": "A", **nested(path, value)}
    Path("spoilt.yaml").write_text(yaml.safe_dump({"dense": dense, "a": entry}, sort_keys=False))
    make_plan(MINI_SCALE, load_ablations("spoilt.yaml"), MINI)


EVERY = settings(
    derandomize=True, deadline=None, database=None, max_examples=5,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)  # fmt: skip


@pytest.mark.parametrize("path", LEAVES)
def test_a_value_of_wrong_type_or_range_is_refused(path):
    is_overridden = path.partition(".")[0] in ("model", "evaluate", "stages")
    doors = [as_scale, as_override] if is_overridden else [as_scale]

    @EVERY
    @given(VALUES.filter(lambda value: wrong(LEAVES[path], value)))
    def check(value: Any) -> None:
        refused(path, value, *doors)

    check()
    for value in PROBES:
        if wrong(LEAVES[path], value):
            refused(path, value, *doors)


@pytest.fixture
def here(monkeypatch):
    """The project's folder, without a mirror."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("STS_DATA_MIRROR", raising=False)


# What is merely huge, and as a seed nothing special; all other numbers have a bound below
HUGE = {  # key -> where the estimate says it
    "stages.align.steps": ("seconds", "training"), "data.scenes.align": ("disk_bytes", "data"),
    "data.scenes.instruct": ("disk_bytes", "data"), "data.scenes.test": ("seconds", "evaluation"),
    "data.scenes.validation": ("disk_bytes", "data"),
}  # fmt: skip
ANY_SEED = {"seeds", "data.scenes.seed"}
ALL_ROWS = {"data.rows.scenes"}  # at most so many are taken


@pytest.mark.parametrize("path", [path for path, rule in LEAVES.items() if rule.is_valid(1)])
def test_no_number_is_accepted_in_a_unit_that_is_far_off(path):
    for value in (10**12, -(10**9), 1e308):
        refused(path, value, as_scale)
    if path not in HUGE.keys() | ANY_SEED | ALL_ROWS:
        refused(path, 10**8, as_plan)


def test_the_estimate_names_what_is_merely_huge(here):
    usual = forecast(as_plan("", {}), GPU)
    for path, (part, name) in HUGE.items():
        assert forecast(as_plan(path, 10**8), GPU)[part][name] > 100 * usual[part][name], path
    wide = {"data": {"scenes": {"align": 10_000}}, "stages": {"align": {"batch_size": 10_000}}}
    (line,) = forecast(as_plan("", wide), GPU)["lacking"]
    assert "align" in line and "batch_size" in line


@pytest.mark.parametrize("path", sorted({path.rpartition(".")[0] for path in LEAVES}))
def test_a_key_that_there_is_not_is_refused(path):
    for key in ("oops", "label", "", "Steps", 1, None):
        refused(path, {key: {}}, as_scale)


TOGETHER = [  # what takes more than one key, or this machine, to see
    # seconds, percent, thousands
    ("stages.align.lr", 3.0), ("stages.align.lr", {"projector": 100}),
    ("stages.align.warmup_ratio", 3), ("stages.align.weight_decay", 5), ("evaluate.blind", 25),
    ("data.max_bad_share", 5), ("stages.align.vtc", {"kind": "random", "keep": 50}),
    ("stages.align.vtc", {"kind": "random", "keep": 0.5, "dense_tail": 20}),
    ("stages.align.lds", {"policy": "sts", "rate": 50}), ("stages.align.lora.dropout", 5),
    ("stages.align.max_grad_norm", 1e4), ("stages.align.max_length", 2_048_000),
    # names
    ("stages.align.data", ["coco"]), ("stages.align.like", "tune"), ("stages.align.init", "tune"),
    ("evaluate.metrics", {"gqa": "exact_match"}),
    ("evaluate.metrics", {"existence": "f2"}), ("data.rows", {"coco": 1}),
    ("data.folders", {"coco": "docs"}), ("data.custom", {"scenes": {"hub": "a/b"}}),
    ("data.folders", {"scenes": "docs"}), ("data.folders", {"llava_pretrian": "docs"}),
    ("data.custom", {"../x": {"hub": "a/b"}}), ("scale", "a" * 65), ("stages", {"eval": {}}),
    # twice
    ("seeds", [1, 1]), ("stages.align.trains", ["projector", "projector"]),
    ("stages.align.data", ["scenes", "scenes"]), ("evaluate.benchmarks", ["shape", "shape"]),
    ("model", {"family": "whole", "checkpoint": "a/b", "fresh": ["projector", "projector"]}),
    # places
    ("data.mirror", "nowhere"), ("data.mirror", "README.md"), ("data.mirror", "a\nb"),
    ("data.folders", {"nlvr": "nowhere"}), ("data.custom", {"own": {"hub": "./nowhere"}}),
    ("data.custom", {"own": {"json": "nowhere.json", "images": "docs"}}),
    ("data.custom", {"own": {"json": "README.md", "images": "nowhere"}}),
    ("data.custom", {"own": {"json": "docs", "images": "docs"}}),
    *(("model", {"family": "whole", "checkpoint": place}) for place in (
        "data/nowhere", "./a/b", "../nowhere", "/nowhere", "a/b/c", "~/b", "README.md", "docs", " ",
        "a/b@", "data/nowhere@main",
    )),
    ("model", {"backbone": "pretrained", "vision": "data/nowhere", "language": "a/b"}),
    ("model", {"backbone": "pretrained", "vision": "a/b", "language": "data/nowhere"}),
    ("model", {"vision": "openai/clip-vit-base-patch16"}), ("model", {"language": "a/b"}),
    # sizes
    ("model.layers", 10), ("model.layers", 32), ("model.vision_feature_layer", 99),
    ("model.vision_feature_layer", -7), ("model.vision_feature_layer", 6),
    ("model", {"family": "whole", "checkpoint": "data/backbones/llava_next", "layers": 13}),
    ("stages.align.max_length", 1), ("stages.align.max_length", 144),
    ("stages.instruct.nodes", 2),
    ("stages.align.lds", {"policy": "sts", "rate": 0.9, "epsilon": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), TOGETHER, ids=str)
def test_what_can_never_be_right_is_refused_at_the_plan(path, value, here):
    refused(path, value, as_plan)


def test_a_mirror_of_the_variable_that_is_not_there_is_refused_at_the_plan(here, monkeypatch):
    monkeypatch.setenv("STS_DATA_MIRROR", "nowhere")
    with pytest.raises(ConfigError, match=r"STS_DATA_MIRROR: 'nowhere' .*a folder that is there"):
        as_plan("seeds", [0])


def test_a_step_takes_no_more_samples_than_there_are():
    for path, value in {
        "stages.align.batch_size": 2401, "stages.align.gradient_accumulation_steps": 601,
        "stages.align.processes": 601, "data.scenes.align": 3, "data.rows.scenes": 3,
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=r"stages\.align\.batch_size: \d+ .* scenes has \d+"):
            as_plan(path, value)


ENTRIES = [
    ("label", "Dense"), ("label", "a\nb"), ("label", "\x1b[31m"), ("label", " "), ("label", "\t"),
    ("steps_share", 1e-9), ("steps_share", 50), ("groups", ["main", "main"]), ("groups", ["Main"]),
    ("seeds", [1, 1]), ("relative_to", "b"), ("relative_to", "dense "), ("source", "theirs"),
    ("", {"groups": ["main", "other"], "relative_to": "dense"}), ("oops", 1), ("", {None: 1}),
    ("overrides", {"align": {"lr": 1e6}}), ("overrides", {"model": {"layers": 11}}),
    ("overrides", {"model": {"family": "whole", "checkpoint": "./nowhere"}}),
    ("overrides", {"evaluate": {"metrics": {"gqa": "f1"}}}),
    ("overrides", {"data": {"threads": 2}}),
    ("overrides", {"evaluate": {"benchmarks": "shape"}}), ("overrides", {"evaluate": [1]}),
    ("overrides", {"align": {"max_length": 100}}), ("overrides", {1: {}}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), ENTRIES, ids=str)
def test_an_entry_that_can_never_be_right_is_refused(path, value, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    assert refused(path.replace("overrides", "a."), value, as_entry).key.startswith("a.")


@pytest.mark.parametrize("path", OF_ENTRY)
def test_a_value_of_an_entry_of_wrong_type_or_range_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in PROBES:
        if wrong(OF_ENTRY[path], value):
            refused(path, value, as_entry)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("seeds: [0] # \u00e9".encode("latin-1"), "byte 13: 'unexpected end of data'"),
        ("seeds: [0]".encode("utf-16"), "byte 0: 'invalid start byte'"),
        (b"", "the file: None"), (b"- 1", "the file: [1]"), (b"\0", "not allowed"),
        (b"? [a, b]\n: 1", "line 1: ['a', 'b'] is not accepted. Accepted: a key that is text"),
        (b"2026-01-01: 1", "the file: 'keys must be str"), (b"seeds: 2026-13-13", "month must"),
        (b"seeds: &a [*a]", "Circular"), (b"data: &a {data: *a}", "Circular"),
        (b"seeds: " + b"[" * 600, "nested without end"),
        (b"seeds: " + b"9" * 9999, "Exceeds the limit"), (b"seeds: [1", "line 1: "),
        (b"seeds: 1\nseeds: 2", "seeds: 'given twice, in lines 1 and 2'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("load", [load_scale, load_ablations])
def test_a_file_that_is_no_configuration_is_refused(load, content, problem, tmp_path):
    file = tmp_path / "odd.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load(file)
    assert str(error.value).startswith(f"{file}: ") and problem in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    for file in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=r": the file: '.*' is not accepted"):
            load_scale(file)


def test_a_file_of_an_editor_of_windows_is_read(tmp_path):
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfseeds: [5]\r\n")
    assert load_scale(tmp_path / "bom.yaml").seeds == [5]
