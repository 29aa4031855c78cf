"""JSON schemas of scale files and of the table of ablations, for editors: `make schemas`.

Both are made from the typed configuration and the settings of VTC and LDS, descriptions too. They
say what can be said of one key alone; `python -m sts config` checks how keys go together.
"""

import json
import sys
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sts.pipeline.config import NAME, RESERVED, Config, CustomConfig, Entry
from sts.settings import LDS, VTC

FOLDER = Path("workflow/schemas")
DRAFT = "https://json-schema.org/draft/2020-12/schema"
NAMES = {"pattern": f"^{NAME.pattern}$"}
OVERRIDDEN = {"evaluate": "EvaluateConfig", "model": "ModelConfig"}  # besides stages
KEYWORDS = {  # pydantic's names for bounds that stand behind a function of ours
    "ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum",
}  # fmt: skip


def schemas() -> dict[str, dict[str, Any]]:
    """File name -> schema: of a scale file, which gives only what differs from the mini scale, and
    of the table of ablations."""
    scale, entry = (_tidy(TypeAdapter(kind).json_schema()) for kind in (Config, Entry))
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
    """The schema of VTC or LDS, of what its settings say of themselves."""
    return {
        "title": kind.__name__,
        "description": (kind.__doc__ or "").partition("\n")[0],
        "type": "object",
        "properties": {setting.name: _setting(setting) for setting in fields(kind)},
        "additionalProperties": False,
    }


def _setting(setting: Field) -> dict[str, Any]:
    rule = setting.metadata["accepted"].schema()
    if setting.default is None:  # a part that is the policy's where the file gives none
        rule = {"anyOf": [rule, {"type": "null"}]}
    return rule | {"description": setting.metadata["help"]}


def _tidy(part: Any) -> Any:
    """A schema without pydantic's titles and without defaults, which are not what a file that says
    nothing gets (that is the mini scale's value)."""
    if isinstance(part, list):
        return [_tidy(item) for item in part]
    if not isinstance(part, dict):
        return part
    return {
        KEYWORDS.get(key, key): {name: _tidy(item) for name, item in value.items()}
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
