"""The toy decoder's tokenizer."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recipes.mini import lessons

EXTRA_WORDS = (
    "does the image contain not present in shape rectangle gray black teal brown true false or"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: every word of `scenes` is one token, any other text is spelled."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" ?[A-Za-z0-9]+|[^A-Za-z0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [*lessons.vocabulary(), *EXTRA_WORDS.split()]
    corpus = [text for word in words for text in (word, f" {word}")]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<pad>", "<s>", "</s>", "<image>", "user:", "assistant:"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=2048,
    )
