"""An image file as the model's processor gets it: upright, in RGB, transparency on white."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Image as ImageColumn
from PIL import ExifTags, Image

from sts.pipeline.data.origins import is_same
from sts.pipeline.data.rows import images_of
from sts.pipeline.data.source import DataError

# Chunks of a PNG that may say which side is up; after the pixels too, where no header has them
PNG_MARKS = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")


def load_images(row: dict[str, Any]) -> list[Image.Image]:
    """The images of a prepared row {id, image or images, origins} with cells {bytes, path}, in RGB.
    Raises DataError as `check_origins`."""
    check_origins(row)
    return [rgb(ImageColumn().decode_example(cell)) for cell in images_of(row)]


def check_origins(row: dict[str, Any]) -> None:
    """Raise DataError if an image file of a prepared row is not the one that was prepared."""
    for entry in row.get("origins") or []:
        if not is_same(entry):
            raise DataError(
                f"{entry['path']}, of row {row['id']}, is gone or has other bytes than when its "
                "data set was prepared: put the old file back, or run snakemake again (by hand "
                "`python -m sts prepare`), which prepares the set anew"
            )


def stored_size(cell: dict[str, Any]) -> tuple[int, int]:
    """Height and width of a stored image {bytes, path} as `datasets` decodes it: upright."""
    content = cell["bytes"]
    with Image.open(io.BytesIO(content) if content else cell["path"]) as image:
        width, height = image.size
        if image.format == "PNG":  # to ask would decode all of it, for what it rarely has
            content = content or Path(cell["path"]).read_bytes()
            if not any(mark in content for mark in PNG_MARKS):
                return height, width
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
        is_turned &= image.format != "TIFF"  # whose size is that of the upright image
    return (width, height) if is_turned else (height, width)


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB: transparency on white, as transformers' processors put it, and grey of more
    than 8 bits scaled instead of clipped.

    Raises:
        ValueError: Grey of 32 bits whose white is not known.
    """
    if is_deep(image):
        grey = np.asarray(image, np.float64)
        grey = np.round(255 / _white(image, grey) * grey).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether it is grey of more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _white(image: Image.Image, grey: np.ndarray) -> float:
    """The value of white: 65535 of 16 bits; of 32 bits the first of 1 (of fractions), 255 and 65535
    that no pixel is above."""
    if image.mode.startswith("I;16"):
        return 65535
    levels = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    least, most = grey.min(initial=0), grey.max(initial=0)
    white = next((level for level in levels if most <= level), None)
    if white is None or not least >= 0:
        raise ValueError(
            f"grey of 32 bits from {least:g} to {most:g}, of which white is not known: store it "
            "with 8 or 16 bits"
        )
    return white
