"""LLaVA-1.5's mix of 665,298 conversations to instruct with, 40,688 of them text alone."""

from pathlib import Path

from sts.pipeline.config import DataConfig
from sts.pipeline.data.fetch import File
from sts.pipeline.data.llava import llava_rows
from sts.pipeline.data.registry import DataSet
from sts.pipeline.data.rows import Rows

JSON = "llava_v1_5_mix665k.json"
COMMIT = "9d451dc7629cfe0469f6ae4432b765cd603d5fcb"
# images.cocodataset.org itself, by a name that has a certificate
COCO = "https://s3.amazonaws.com/images.cocodataset.org/zips/train2017.zip"
COCO_SHA256 = "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"
TEXTVQA = "https://dl.fbaipublicfiles.com/textvqa/images"
VISUAL_GENOME = "https://cs.stanford.edu/people/rak248/VG_100K_2"
OCR_VQA = "weizhiwang/llava_v15_instruction_images"


def _rows(_: DataConfig, folder: Path) -> dict[str, Rows]:
    return {"instruct": llava_rows("llava_mix665k", folder / JSON, folder)}


DATASET = DataSet(
    version="665k",
    licence="CC-BY-4.0 for the texts, within OpenAI's terms of use; the images have their own",
    homepage="https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
    citation="Liu et al. Improved Baselines with Visual Instruction Tuning. CVPR 2024.",
    load=_rows,
    # where LLaVA's README says that the images are
    files=(
        File(f"liuhaotian/LLaVA-Instruct-150K/{JSON}", gigabytes=1.03, revision=COMMIT),
        File(COCO, "coco", "train2017", 19.3, sha256=COCO_SHA256),
        File("https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip", "gqa", "images", 21.8),
        File(f"{TEXTVQA}/train_val_images.zip", "textvqa", "train_images", 7.07),
        File(f"{VISUAL_GENOME}/images.zip", "vg", "VG_100K", 9.73),
        File(f"{VISUAL_GENOME}/images2.zip", "vg", "VG_100K_2", 5.47),
        # the publishers' links are mostly dead; this copy is that of LLaVA's pull request 1458
        File(f"{OCR_VQA}/ocr_vqa_images_llava_v15.zip", "ocr_vqa/images", ".", 8.97),
    ),
    embed=False,
)
