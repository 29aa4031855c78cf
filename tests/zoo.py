"""A tiny random model of every image-text-to-text type that there can be one of."""

from dataclasses import replace

import tiny
import transformers as hf
import zoo_grids
import zoo_llava
import zoo_others
import zoo_qwen
import zoo_tiles

ZOO: dict[str, tiny.Case] = {}
for _module in (tiny, zoo_llava, zoo_qwen, zoo_grids, zoo_tiles, zoo_others):
    ZOO |= _module.CASES

# Where nothing tells the library how an image lies, a run of placeholders that is a square is taken
# for one, and any other for a sequence
AS_RUNS = ("deepseek_ocr2", "unlimited_ocr", "step3p7", "fast_vlm", "fuyu", "gemma4",
           "gemma4_unified", "instructblipvideo", "inkling_mm_model")  # fmt: skip


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
