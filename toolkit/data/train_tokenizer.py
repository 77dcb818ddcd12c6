"""A byte-level BPE tokenizer from a stage's own text. Called by prepare for a model that is built from nothing."""

from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from toolkit.recipe.models import BuildTokenizer

BOS, EOS = "<|bos|>", "<|eos|>"
# Pieces of source code: acronyms, capitalised or lower-case words, other letters, up to 3 digits, underscores, other
# marks (each with the space before it), white space; so HTTPServer_v12 gives HTTP, Server, _, v, 12.
_IDENTIFIERS = (
    r" ?\p{Lu}+(?!\p{Ll})| ?\p{Lu}?[\p{Ll}\p{M}]+| ?[\p{Lt}\p{Lm}\p{Lo}\p{M}]+| ?\p{N}{1,3}| ?_+"
    r"| ?[^\s\p{L}\p{M}\p{N}_]+|\s+(?!\S)|\s+"
)

_CASE_CHANGE = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"  # camelCase, and before the last of HTTPServer


def train_tokenizer(settings: BuildTokenizer, texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts a begin token before every text and gives every text back exactly (except `words`).

    Special tokens are <|bos|> and <|eos|> (padding too); the same words in a text are ordinary text.
    """
    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    match settings.pieces:
        case "text":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        case "identifiers":
            split = pre_tokenizers.Split(Regex(_IDENTIFIERS), behavior="isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
        case "words":
            apart = normalizers.Replace(Regex(_CASE_CHANGE), " ")
            tokenizer.normalizer = normalizers.Sequence([apart, normalizers.Lowercase()])
            split = pre_tokenizers.Split(Regex(r"[^\p{L}\p{M}\p{N}]+"), behavior="removed")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        padding_side="right",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
