"""JSON schemas of scale files and of the table of ablations, for editors: `make schemas`.

Both are made from the typed configuration and the settings of VTC and LDS, descriptions too. They
say what can be said of one key alone; `python -m sts config` checks how keys go together.
"""

import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter

from sts.lds import DEPTHS, DRAWS, POLICIES, UNITS
from sts.pipeline.config import NAME, RESERVED, Config, CustomConfig, _Entry
from sts.schedule import SCHEDULES
from sts.settings import CLOCKS, LDS, POSITIONS, TEXTS, VTC
from sts.vtc import KINDS

FOLDER = Path("workflow/schemas")
DRAFT = "https://json-schema.org/draft/2020-12/schema"
NAMES = {"pattern": f"^{NAME.pattern}$"}
OVERRIDDEN = {"evaluate": "EvaluateConfig", "model": "ModelConfig"}  # besides stages
SHARE = {"minimum": 0, "maximum": 1}
ACCEPTED: dict[type, dict[str, Any]] = {  # what sts.settings checks, key by key
    VTC: {
        "kind": KINDS,
        "keep": {"exclusiveMinimum": 0, "maximum": 1},
        "schedule": SCHEDULES,
        "dense_tail": SHARE,
        "positions": POSITIONS,
        "text": TEXTS,
    },
    LDS: {
        "policy": POLICIES,
        "rate": SHARE,
        "schedule": SCHEDULES,
        "depth": DEPTHS,
        "draw": DRAWS,
        "unit": UNITS,
        "epsilon": {"minimum": -1, "maximum": 1},
        "protect_first": {"minimum": 0},
        "protect_last": {"minimum": 0},
        "dense_tail": SHARE,
        "clock": CLOCKS,
        "explore": SHARE,
        "ema": {"minimum": 0, "exclusiveMaximum": 1},
    },
}
KEYWORDS = {  # pydantic's names for bounds that stand behind a function of ours
    "ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum",
}  # fmt: skip
TYPES = {str: "string", float: "number", int: "integer", bool: "boolean", type(None): "null"}


def schemas() -> dict[str, dict[str, Any]]:
    """File name -> schema: of a scale file, which gives only what differs from the mini scale, and
    of the table of ablations."""
    scale, entry = (_tidy(TypeAdapter(kind).json_schema()) for kind in (Config, _Entry))
    blocks = scale.pop("$defs") | entry.pop("$defs", {})
    for key, kind in (("vtc", VTC), ("lds", LDS)):
        blocks[kind.__name__] = _settings(kind)
        blocks["StageConfig"]["properties"][key]["$ref"] = f"#/$defs/{kind.__name__}"
    for name, block in (*blocks.items(), ("Scale", scale)):
        if name != CustomConfig.__name__:  # what a file leaves out has a value in the mini scale
            block.pop("required", None)

    stage = {"anyOf": [{"$ref": "#/$defs/StageConfig"}, {"type": "null"}]}
    scale["properties"]["stages"] |= {
        "additionalProperties": stage,
        "propertyNames": NAMES | {"not": {"enum": list(RESERVED)}},
    }
    entry["properties"]["overrides"] |= {
        "properties": {name: {"$ref": f"#/$defs/{block}"} for name, block in OVERRIDDEN.items()},
        "additionalProperties": stage,
        "propertyNames": NAMES | {"not": {"enum": [n for n in RESERVED if n not in OVERRIDDEN]}},
    }
    table = {
        "description": "Id -> a named delta of a scale; the first is the baseline.",
        "type": "object",
        "additionalProperties": entry,
        "propertyNames": NAMES,
    }
    head, tail = {"$schema": DRAFT}, {"$defs": blocks}
    return {"scale.schema.json": head | scale | tail, "ablations.schema.json": head | table | tail}


def _settings(kind: type) -> dict[str, Any]:
    """The schema of VTC or LDS: its fields, what is accepted, and the words of its docstring."""
    hints, words = get_type_hints(kind), descriptions(kind)
    properties = {}
    for field in fields(kind):
        types = [TYPES[one] for one in get_args(hints[field.name]) or (hints[field.name],)]
        accepted = ACCEPTED[kind].get(field.name, {})
        if "string" in types:
            rule: dict[str, Any] = {"enum": [*accepted, *([None] if "null" in types else [])]}
        else:
            rule = {"type": types if len(types) > 1 else types[0], **accepted}
        properties[field.name] = rule | {"description": words[field.name]}
    return {
        "title": kind.__name__,
        "description": (kind.__doc__ or "").partition("\n")[0],
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def descriptions(kind: type) -> dict[str, str]:
    """Field -> what the docstring of VTC or LDS says of it, as `name: words.` or `a, b: ...`"""
    text = " ".join((kind.__doc__ or "").split())
    names = "|".join(field.name for field in fields(kind))
    found = re.split(rf"(?<=[.;] )((?:{names})(?:, (?:{names}))*): ", text)
    return {
        name: said.strip().rstrip(";.")
        for keys, said in zip(found[1::2], found[2::2], strict=True)
        for name in keys.split(", ")
    }


def _tidy(part: Any) -> Any:
    """A schema without pydantic's titles and without defaults, which are not what a file that says
    nothing gets (that is the mini scale's value)."""
    if isinstance(part, list):
        return [_tidy(one) for one in part]
    if not isinstance(part, dict):
        return part
    return {
        KEYWORDS.get(key, key): {name: _tidy(one) for name, one in value.items()}
        if key in ("properties", "$defs")
        else _tidy(value)
        for key, value in part.items()
        if key not in ("title", "default")
    }


def main(folder: Path = FOLDER) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, schema in schemas().items():
        (folder / name).write_text(json.dumps(schema, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
