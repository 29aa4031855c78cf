"""JSON schemas of scale files and of the table of ablations, for editors: `make schemas`.

Both are made from the typed configuration and the settings of VTC and LDS, descriptions too. They
say what can be said of one key alone; `python -m sts config` checks how keys go together.
"""

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from sts.pipeline.config import NAME, RESERVED, Config, Entry, SearchConfig
from sts.settings import LDS, VTC

FOLDER = Path("workflow/schemas")
NAMES = {"pattern": f"^{NAME.pattern}$"}
OVERRIDDEN = {"evaluate": "EvaluateConfig", "model": "ModelConfig"}  # besides stages


class _Plain(GenerateJsonSchema):
    """Without titles of keys, and without defaults: a file that says nothing gets the mini scale's
    value."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: Any) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])


def schemas() -> dict[str, dict[str, Any]]:
    """File name -> schema: of a scale file, which gives only what differs from the mini scale, of
    the table of ablations, and of a search."""
    scale, entry = (kind.model_json_schema(schema_generator=_Plain) for kind in (Config, Entry))
    blocks = scale.pop("$defs")
    for key, kind in (("vtc", VTC), ("lds", LDS)):
        blocks[kind.__name__] = _settings(kind)
        blocks["StageConfig"]["properties"][key]["$ref"] = f"#/$defs/{kind.__name__}"
    for block in (scale, blocks["StageConfig"]):
        del block["required"]  # what a file leaves out has a value in the mini scale

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
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    files = {"scale.schema.json": scale, "ablations.schema.json": table}
    search = SearchConfig.model_json_schema(schema_generator=_Plain)
    return {name: head | schema | {"$defs": blocks} for name, schema in files.items()} | {
        "search.schema.json": head | search
    }


def _settings(kind: type) -> dict[str, Any]:
    """The schema of VTC or LDS, of what its settings say of themselves."""
    rules = {}
    for setting in fields(kind):
        rule = setting.metadata["accepted"].schema()
        if setting.default is None:  # a part that is the policy's where the file gives none
            rule = {"anyOf": [rule, {"type": "null"}]}
        rules[setting.name] = rule | {"description": setting.metadata["help"]}
    return {
        "title": kind.__name__,
        "description": (kind.__doc__ or "").partition("\n")[0],
        "type": "object",
        "properties": rules,
        "additionalProperties": False,
    }


def main(folder: Path = FOLDER) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, schema in schemas().items():
        (folder / name).write_text(json.dumps(schema, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
