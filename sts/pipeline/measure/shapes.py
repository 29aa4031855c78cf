"""Known models by name: their Hugging Face configurations, random weights, made-up batches.

Nothing is downloaded. The sizes of published models are in shapes.yaml; `mini` is read from the
files of the shipped backbones.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
)

from sts.checks import expect
from sts.pipeline.config import model_folder
from sts.pipeline.data.collator import collate
from sts.pipeline.data.tokens import expand, tokenise
from sts.pipeline.train.joined import TOWERS, tower_config
from sts.settings import IGNORE_INDEX

IMAGE_TOKEN = 3  # id of the placeholder
PICTURE = (480, 640)  # height and width in pixels, as most of COCO has
SIDE = 24  # visual tokens along each side of a picture, where the model takes any size
PARTS, SHAPES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8")).values()


def shape(name: str, layers: int | None = None, width: float = 1.0) -> PreTrainedConfig:
    """The configuration of a known model, cut to `layers` decoder layers and a share `width` of its
    channels. Raises ValueError for an unknown name."""
    expect(name in SHAPES, "shape", name, f"one of {', '.join(SHAPES)}")
    sizes = SHAPES[name]
    if "vision" in sizes:
        config = joined(part(sizes["vision"]), part(sizes["language"]))
    else:
        config = AutoConfig.for_model(**sizes)
    if layers in (None, config.text_config.num_hidden_layers) and width == 1:
        return config
    return _cut(config, layers, width)


def part(name: str | Mapping[str, object]) -> PreTrainedConfig:
    """The configuration of a vision tower or language model: of a published one, a local folder, or
    the local hub cache, or of its sizes. Raises ValueError where it is in none of them."""
    sizes = PARTS.get(name.partition("@")[0]) if isinstance(name, str) else name
    if sizes:
        return AutoConfig.for_model(**sizes)
    config = local(name)
    return getattr(config, "vision_config", config)


def local(name: str) -> PreTrainedConfig:
    """The configuration of a model in a local folder or the local hub cache. Raises ValueError
    where it is in neither."""
    folder = model_folder(name)
    if folder is None or not (folder / "config.json").is_file():
        raise ValueError(
            f"model {name}: its sizes are not known here. Download it first (hf download {name}) "
            f"or give a local folder; known without: {', '.join(PARTS)}"
        )
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def joined(
    vision: PreTrainedConfig, language: PreTrainedConfig, feature_layer: int = -2
) -> LlavaConfig:
    """A vision tower and a language model as LLaVA joins them."""
    vision = tower_config("the tower", vision)
    return LlavaConfig(
        vision_config=vision,
        text_config=language,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=TOWERS[vision.model_type],
        image_token_index=IMAGE_TOKEN,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=language.tie_word_embeddings,
    )


def _cut(config: PreTrainedConfig, layers: int | None, width: float) -> PreTrainedConfig:
    """Fewer layers, of the vision tower in proportion, and fewer channels; heads stay as wide as
    they are, and as many of the decoder's as before share their keys."""
    text, vision = config.text_config, config.vision_config
    full = text.num_hidden_layers
    text.num_hidden_layers = min(layers or full, full)
    depth = text.num_hidden_layers / full
    vision.num_hidden_layers = max(2, round(vision.num_hidden_layers * depth))

    def narrow(size: int, multiple: int) -> int:
        return max(multiple, round(size * width / multiple) * multiple) if width < 1 else size

    text.num_key_value_heads = max(1, round(text.num_key_value_heads * width))
    for sizes, multiple in ((text, text.num_key_value_heads), (vision, 1)):
        head = sizes.hidden_size // sizes.num_attention_heads
        sizes.num_attention_heads = narrow(sizes.num_attention_heads, multiple)
        sizes.hidden_size = sizes.num_attention_heads * head
        sizes.intermediate_size = narrow(sizes.intermediate_size, 32)
    if isinstance(config, Qwen2_5_VLConfig):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
        blocks = vision.fullatt_block_indexes
        vision.fullatt_block_indexes = [i for i in blocks if i < vision.num_hidden_layers]
        vision.out_hidden_size = text.hidden_size
    return config


def random_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with random weights, whatever number format the configuration speaks of."""
    return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def side(config: PreTrainedConfig) -> int:
    """Visual tokens along each side of a picture."""
    vision = config.vision_config
    return vision.image_size // vision.patch_size if hasattr(vision, "image_size") else SIDE


def processed_batch(checkpoint: str) -> Mapping[str, Tensor]:
    """What a local checkpoint's processor makes of a question about a picture of PICTURE, and its
    answer. Raises ValueError where there is no processor."""
    try:
        processor = AutoProcessor.from_pretrained(
            model_folder(checkpoint), local_files_only=True, trust_remote_code=False
        )
    except OSError as error:
        raise ValueError(
            f"model {checkpoint}: its processor is not known here, which says how many tokens a "
            f"picture becomes. Download it first (hf download {checkpoint})"
        ) from error
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "nothing"}]
    (tokens,) = tokenise(processor, [turns], [[PICTURE]])
    ids, labels = expand(tokens)
    picture = Image.new("RGB", PICTURE[::-1], "grey")
    sample = {"input_ids": ids, "labels": labels, "images": [picture]}
    return collate(processor, [sample])


def made_up_batch(
    config: PreTrainedConfig, batch: int, text: int, answer: int
) -> dict[str, Tensor]:
    """A batch of random samples, always the same: a picture each and `text` tokens, the first of
    which stands before the picture and of which the last `answer` are the answer.

    input_ids, attention_mask and labels are [batch, visual + text].
    """
    generator = torch.Generator().manual_seed(0)
    visual, vision = side(config) ** 2, config.vision_config
    size = (batch, visual + text)
    ids = torch.randint(IMAGE_TOKEN + 1, config.text_config.vocab_size, size, generator=generator)
    ids[:, 1 : visual + 1] = config.image_token_id
    labels = ids.clone()
    labels[:, : visual + text - answer] = IGNORE_INDEX
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if not isinstance(config, Qwen2_5_VLConfig):
        pixels = side(config) * vision.patch_size
        return tokens | {"pixel_values": torch.randn(batch, 3, pixels, pixels, generator=generator)}
    rows = side(config) * vision.spatial_merge_size  # of patches, several of which become a token
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    return tokens | {
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.randn(batch * rows**2, values, generator=generator),
        "image_grid_thw": torch.tensor([[1, rows, rows]] * batch),
    }
