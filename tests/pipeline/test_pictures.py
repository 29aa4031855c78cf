"""What each kind of image file is decoded to: what transformers makes of it, and grey in full."""

import io

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from PIL import Image, ImageDraw, PngImagePlugin
from transformers.image_transforms import convert_to_rgb

from sts.pipeline.data.pictures import rgb, stored_size
from sts.pipeline.data.prepare import TRAINING, BadRow, _image

RAMP = np.linspace(0, 1, 96)[None].repeat(64, 0)
TURNED = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'  # noqa: E501


def drawing() -> Image.Image:
    """Black words on nothing: whoever drops the transparency sees all black."""
    image = Image.new("RGBA", (96, 64), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((10, 20), "EXIT 12", fill=(0, 0, 0, 255))
    return image


def reopened(image: Image.Image, kind: str = "PNG", **options) -> Image.Image:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return Image.open(content)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "palette", "1", "L", "CMYK", "RGB with a colour"])
def test_a_picture_is_what_transformers_makes_of_it(mode):
    if mode == "palette":
        image = reopened(drawing().quantize(8))
    elif mode == "RGB with a colour":
        image = reopened(drawing().convert("RGB"), transparency=(0, 0, 0))
    else:
        image = reopened(drawing().convert(mode), "TIFF")
    assert np.array_equal(np.asarray(rgb(image)), convert_to_rgb(image, return_numpy=True))
    if mode in ("RGBA", "LA", "palette"):
        assert np.asarray(rgb(image)).mean() > 200  # mostly white


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        ((65535 * RAMP).astype(np.uint16), "PNG"),
        ((65535 * RAMP).astype(np.int32), "TIFF"),
        ((255 * RAMP).astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((255 * RAMP).astype(np.float32), "TIFF"),
    ],
)
def test_deep_grey_keeps_its_shades(pixels, kind):
    shades = np.asarray(rgb(reopened(Image.fromarray(pixels), kind)))
    assert np.abs(shades - 255 * RAMP[..., None]).max() <= 1.0


def test_grey_of_an_unknown_white_is_a_bad_row_and_scaled_grey_a_note(tmp_path):
    file, odd = tmp_path / "a.tif", []
    Image.fromarray((1e6 * RAMP).astype(np.float32)).save(file)
    with pytest.raises(BadRow, match="from 0 to 1e\\+06, of which white is not known"):
        _image(file, False, odd)
    Image.fromarray((65535 * RAMP).astype(np.uint16)).save(tmp_path / "b.png")
    _image(tmp_path / "b.png", False, odd)
    assert odd == ["I;16 grey, scaled to 8 bits"]


@pytest.mark.parametrize("where", ["xmp", "exif", "nowhere"])
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "TIFF"])
def test_the_size_is_that_of_the_upright_picture(kind, where):
    image, content, options = Image.new("RGB", (96, 64), "red"), io.BytesIO(), {}
    if where == "exif":
        options["exif"] = Image.Exif()
        options["exif"][274] = 6
    elif where == "xmp" and kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", TURNED.decode())
    elif where == "xmp":
        options["xmp"] = TURNED
    image.save(content, kind, **options)
    cell = {"bytes": content.getvalue(), "path": None}
    row = {"id": "1", "image": cell, "conversations": []}
    table = pa.Table.from_pylist([row], schema=TRAINING.arrow_schema)
    decoded = Dataset(table, info=None).cast(TRAINING)[0]["image"]
    assert stored_size(cell) == decoded.size[::-1]
    if kind != "TIFF" or where == "exif":  # Pillow writes no XMP into a TIFF
        assert stored_size(cell) == ((64, 96) if where == "nowhere" else (96, 64))
