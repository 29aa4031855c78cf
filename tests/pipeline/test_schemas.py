"""The JSON schemas that editors read: in step with what the pipeline accepts."""

import copy
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from sts import LDS, VTC
from sts.pipeline.config import load_yaml
from sts.pipeline.config.schemas import FOLDER, schemas

ROOT = Path(__file__).resolve().parents[2]
SCALE, ABLATIONS = "scale.schema.json", "ablations.schema.json"
SEARCH = "search.schema.json"
FILES = [*sorted((ROOT / "workflow/config").glob("*.yaml")), ROOT / "workflow/ablations.yaml"]


def schema_of(file: Path) -> str:
    """The schema that the first line of a file names for editors, seen from that file."""
    first = file.read_text().partition("\n")[0]
    (name,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", first)
    return (file.parent / name).resolve().name


def problems(name: str, content: object) -> list[str]:
    return [error.message for error in Draft202012Validator(schemas()[name]).iter_errors(content)]


@pytest.mark.slow  # a new kind, policy, set or benchmark is a name more; nothing reads it there
@pytest.mark.parametrize("name", [SCALE, ABLATIONS, SEARCH])
def test_a_schema_is_in_step_with_the_configuration(name):
    written = json.loads((ROOT / FOLDER / name).read_text())
    assert written == schemas()[name], "run `make schemas`"
    Draft202012Validator.check_schema(written)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_of_the_workflow_is_valid_by_the_schema_that_it_names(file):
    assert schema_of(file) == {"ablations": ABLATIONS, "search": SEARCH}.get(file.stem, SCALE)
    assert problems(schema_of(file), load_yaml(file)) == []


WRONG = [  # where, what is put there, what the schema says of it
    ("seeds", "[-1]", "-1 is less than"),
    ("scale", "Mini", "does not match"),
    ("model.backbone", "shiped", "is not one of"),
    ("modle", "{}", "unexpected"),
    ("data.custom.mine", "{jason: a.json}", "unexpected"),
    ("stages.align.step", "9", "not valid under any"),
    ("stages.align.trains", "[head]", "not valid under any"),
    ("stages.align.lr", "{projector: 0}", "not valid under any"),
    ("stages.align.vtc.keep", "1.5", "not valid under any"),
    ("stages.align.lds.policy", "stss", "not valid under any"),
    ("stages.backbone", "{steps: 1}", "should not be valid"),
    ("evaluate.limit", "0", "not valid under any"),
]


@pytest.mark.parametrize(("key", "value", "output"), WRONG, ids=[key for key, *_ in WRONG])
def test_a_wrong_key_or_value_of_a_scale_is_told(key, value, output):
    scale = load_yaml(ROOT / "workflow/config/smoke.yaml")
    *parents, last = key.split(".")
    block = scale
    for parent in parents:
        block = block.setdefault(parent, {})
    block[last] = yaml.safe_load(value)
    (problem,) = problems(SCALE, scale)
    assert output in problem


@pytest.mark.parametrize(
    ("entry", "right"),
    [
        ("{label: A, overrides: {instruct: null, evaluate: {limit: 5}}}", True),
        ("{label: A, overrides: {tune: {trains: [lora], init: align}}}", True),
        ("{overrides: {}}", False),
        ("{label: A, group: [main]}", False),
        ("{label: A, steps_share: 0}", False),
        ("{label: A, overrides: {eval: {limit: 5}}}", False),
        ("{label: A, overrides: {evaluate: {limits: 5}}}", False),
        ("{label: A, overrides: {align: {vtc: {kept: 0.5}}}}", False),
    ],
)
def test_an_ablation_is_valid_or_not(entry, right):
    assert (problems(ABLATIONS, {"mine": yaml.safe_load(entry)}) == []) is right


PROBES = [-2, -1, -0.5, 0, 0.25, 1, 1.5, 2, True, "x", "constant", None]


@pytest.mark.parametrize("kind", [VTC, LDS])
@pytest.mark.parametrize("probe", PROBES, ids=str)
def test_the_schema_of_a_block_accepts_what_the_library_accepts(kind, probe):
    rules = schemas()[SCALE]["$defs"][kind.__name__]["properties"]
    on = {"kind": "uniform"} if kind is VTC else {"policy": "layerdrop"}
    for field in fields(kind):
        try:
            kind(**on | {field.name: probe})
            accepted = True
        except ValueError:
            accepted = False
        assert Draft202012Validator(rules[field.name]).is_valid(probe) is accepted, field.name


def test_every_name_that_the_schema_lists_is_one_of_the_library():
    blocks = copy.deepcopy(schemas()[SCALE]["$defs"])
    for kind in blocks["VTC"]["properties"]["kind"]["enum"]:
        VTC(kind)
    for policy in blocks["LDS"]["properties"]["policy"]["enum"]:
        LDS(policy)


@pytest.mark.parametrize("kind", [VTC, LDS])
def test_every_setting_of_the_library_is_described_where_help_and_schema_take_it(kind):
    rules = schemas()[SCALE]["$defs"][kind.__name__]["properties"]
    assert [*rules] == [setting.name for setting in fields(kind)]
    for name, rule in rules.items():
        assert f"\n    {name}: {rule['description']}; " in kind.__doc__
    assert "Share of the visual tokens that reaches" in VTC.__doc__
    assert "; a number in (0, 1]." in VTC.__doc__
