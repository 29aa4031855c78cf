"""A processor as LLaVA's, over the words of `scenes`."""

IMAGE, PATCH = 64, 16  # pixels; 16 patch tokens an image


def tiny_processor():
    """LlavaProcessor with a word-level tokenizer over the words of `scenes`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from sts.mini import scenes
    from sts.pipeline.data.conversation import CHAT_TEMPLATE

    special = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
    words = [*special, *sorted({"user", "assistant", ":", "\n", *scenes.vocabulary()})]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="right",
    )
    side = {"height": IMAGE, "width": IMAGE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": IMAGE}, crop_size=side),
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )
