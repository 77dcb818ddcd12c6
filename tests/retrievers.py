"""A tiny random retriever that the tests of embedding and evaluation share."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from toolkit.models.encoder import Encoder
from toolkit.recipe.models import EncoderSettings
from toolkit.retrieval.embed import Retriever

WORDS = [f"w{i}" for i in range(200)]


def tiny_retriever(**changes: Any) -> Retriever:
    """Random weights, one token a word; `changes` are for the encoder settings."""
    settings = {
        "pooling": "mean", "normalize": True, "append_eos": True, "query_prefix": "w0 ", "passage_prefix": "w1 ",
        "max_tokens": 8, "eval_max_tokens": 48,
    }  # fmt: skip
    words = {"<unk>": 0, "<eos>": 1, "<pad>": 2} | {word: i for i, word in enumerate(WORDS, 3)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    settings = EncoderSettings.model_validate(settings | changes)
    return Retriever(Encoder(LlamaModel(config), settings.pooling, settings.normalize).eval(), fast, settings)


def ragged_texts(count: int, longest: int = 40) -> list[str]:
    """Different texts of 1 to `longest` words."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(200, (n,), generator=generator).tolist()) for n in lengths]
