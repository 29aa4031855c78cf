"""LLaVA-Pretrain: 558k captions to align on, of images of LAION, CC and SBU."""

from pathlib import Path

from sts.pipeline.config import DataConfig
from sts.pipeline.data.fetch import File
from sts.pipeline.data.llava import llava_rows
from sts.pipeline.data.registry import DataSet
from sts.pipeline.data.rows import Rows

COMMIT = "70f9d1e5e1a697fe35830875cfc7de1dd590d727"
JSON = "blip_laion_cc_sbu_558k.json"


def _rows(_: DataConfig, folder: Path) -> dict[str, Rows]:
    return {"align": llava_rows("llava_pretrain", folder / JSON, folder / "images")}


DATASET = DataSet(
    version="558k",
    licence="that of CC-3M and, for the captions, of BLIP",
    homepage="https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain",
    citation="Liu et al. Visual Instruction Tuning. NeurIPS 2023.",
    load=_rows,
    files=(
        File(f"liuhaotian/LLaVA-Pretrain/{JSON}", gigabytes=0.18, revision=COMMIT),
        File("liuhaotian/LLaVA-Pretrain/images.zip", "images", ".", 27.4, COMMIT),
    ),
    embed=False,
)
