"""A tiny random model of every image-text-to-text type that there can be one of: ZOO[model_type]."""

import tiny
import zoo_grids
import zoo_llava
import zoo_others
import zoo_qwen
import zoo_tiles

ZOO: dict[str, tiny.Case] = {}
for _module in (tiny, zoo_llava, zoo_qwen, zoo_grids, zoo_tiles, zoo_others):
    ZOO |= _module.CASES
