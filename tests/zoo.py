"""A tiny random model of every image-text-to-text type that there can be one of."""

from dataclasses import replace
from pathlib import Path

import tiny
import transformers as hf
import zoo_grids
import zoo_llava
import zoo_others
import zoo_qwen
import zoo_tiles
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as TYPES,
)

from sts.architectures import ARCHITECTURES, NO_LDS, NO_VTC, REFUSED, Architecture

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
NO_BACKWARD = ("blip-2", "nemotron_h_omni")  # layers without an attention and an MLP of their own

ZOO: dict[str, tiny.Case] = {}
for _module in (tiny, zoo_llava, zoo_qwen, zoo_grids, zoo_tiles, zoo_others):
    ZOO |= _module.CASES

# Where nothing tells the library how an image lies, a run of placeholders that is a square is taken
# for one, and any other for a sequence
AS_RUNS = ("deepseek_ocr2", "unlimited_ocr", "step3p7", "fast_vlm", "fuyu", "inkling_mm_model")


def _run(tokens: int) -> list[tuple[int, int, bool]]:
    side = round(tokens**0.5)
    return [(side, side, False) if side**2 == tokens else (1, tokens, False)]


ZOO |= {
    name: replace(case, images={image: _run(case.tokens(image)) for image in case.images})
    for name, case in ZOO.items()
    if name in AS_RUNS
}


def _same_class(name: str, config: type) -> tiny.Case:
    """A type whose class is another one's."""

    def build(*args, **kwargs):
        model = ZOO[name].build(*args, **kwargs)
        settings = model.config.to_dict() | {"image_token_id": tiny.IMAGE}
        del settings["model_type"]
        model.config = config(**settings)
        return model

    return replace(ZOO[name], build=build)


ZOO["glmga"] = _same_class("glm46v", hf.GlmgaConfig)
ZOO["pp_chart2table"] = _same_class("got_ocr2", hf.PPChart2TableConfig)
ZOO["shieldgemma2"] = _same_class("gemma3", hf.ShieldGemma2Config)


HEAD = """# Architectures

Of all {all} image-text-to-text types of transformers {version}, {carried} are supported, {both} of them with both
VTC and LDS; {refused} are refused. `PYTHONPATH=. python tests/zoo.py` writes this page, and
`tests/library/test_breadth.py` checks it. That file and `tests/library/test_architectures.py` (14 types) test every
supported type with tiny random weights of its real class, by the loss and every gradient:

- VTC and LDS against the sequence shortened by hand and the model without the skipped layers;
- unit `samples` against each row through its own layers;
- an idle scheme against the model itself.

Units `tokens` and `backward` are run on all types, and compared with a reference on the 14. No full-size weights were
available.

The grids of images are found by the library (from the sizes that the processor gives, otherwise from runs of
placeholders: a square, or a sequence) or given by an entry in `sts/architectures/`.

| model_type | class | VTC | LDS, units | grids of images |
|---|---|---|---|---|
"""  # noqa: E501
REASONS = """- Types without units `samples` and `tokens` pass on or share what a layer computes from all tokens;
  those without `backward` have layers without an attention and an MLP of their own.
- `gemma3n`, `gemma4`: layers whose keys and values are read by others always run.

Refused, with the reason:

| model_type | class | reason |
|---|---|---|
"""  # noqa: E501


def table() -> str:
    """docs/architectures.md: what is carried and tested, and what is refused and why."""
    carried = sorted(name for name in TYPES if name not in REFUSED)
    both = [name for name in carried if name not in NO_VTC and name not in NO_LDS]
    text = HEAD.format(
        all=len(TYPES),
        version=hf.__version__,
        carried=len(carried),
        both=len(both),
        refused=len(REFUSED),
    )
    for name in carried:
        entry = ARCHITECTURES.get(name, Architecture())
        units = ["layer"]
        units += ["samples", "tokens"] if entry.partial else []
        units += [] if name in NO_BACKWARD else ["backward"]
        vtc = "no" if name in NO_VTC else "yes"
        lds = "no" if name in NO_LDS else "all" if len(units) == 4 else ", ".join(units)
        where = "found" if entry.grids is Architecture().grids else "by an entry"
        text += f"| `{name}` | {TYPES[name]} | {vtc} | {lds} | {where} |\n"
    text += "\nSupported in part:\n\n"
    text += "".join(f"- `{name}`, no VTC: {why}.\n" for name, why in NO_VTC.items())
    text += "".join(f"- `{name}`, no LDS: {why}.\n" for name, why in NO_LDS.items())
    text += REASONS
    rows = sorted(REFUSED.items())
    return text + "".join(f"| `{name}` | {TYPES[name]} | {why} |\n" for name, why in rows)


if __name__ == "__main__":
    PAGE.write_text(table(), encoding="utf-8")
