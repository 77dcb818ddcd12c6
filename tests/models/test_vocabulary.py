"""Ids that a model has no embedding for: the padding token gives way, anything else is refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_model
from tiny_retriever import CASES, TEXTS, make, small_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from toolkit.export.write import load_export
from toolkit.models.backbone import load_tokenizer
from toolkit.models.retriever import Retriever, load_retriever
from toolkit.models.vocabulary import model_tokenizer
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.evaluation import EvalSettings
from toolkit.recipe.models import EncoderSettings
from toolkit.retrieval.embed import embed_texts
from toolkit.retrieval.retrievers import load_any

SETTINGS = EncoderSettings(
    pooling="mean", normalize=True, append_eos=True, query_prefix="", passage_prefix="", max_tokens=16,
    eval_max_tokens=24,
)  # fmt: skip


def model(folder: Path, rows: int, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def padded(rows: int, folder: Path) -> Path:
    """A model whose tokenizer got a padding token of its own, behind the vocabulary."""
    tokenizer = small_tokenizer("bos")
    assert len(tokenizer) <= rows
    if len(tokenizer) < rows:
        tokenizer.add_tokens([f"extra {i}" for i in range(rows - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == rows
    return model(folder, rows, tokenizer)


def vectors(folder: Path) -> np.ndarray:
    return embed_texts(load_retriever(folder, SETTINGS, torch.float32, "cpu"), TEXTS, "query")


def test_a_padding_token_without_an_embedding_gives_way_to_the_end_token(tmp_path: Path, capfd) -> None:
    folder = padded(330, tmp_path / "m")
    tokenizer = model_tokenizer(folder)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("</s>", tokenizer.eos_token_id)
    line = f"warning: {folder}: the padding token '[PAD]' has id 330, and the model 330 embeddings; padded is with the "
    assert capfd.readouterr().err == line + "end token '</s>', which changes no vector\n"
    together = vectors(folder)
    retriever = load_retriever(folder, SETTINGS, torch.float32, "cpu")
    alone = np.concatenate([embed_texts(retriever, [text], "query") for text in TEXTS])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)
    assert capfd.readouterr().err == ""  # once
    named = embed_texts(retriever, ["a text with [PAD] in it", "another"], "query")  # is text like any other
    assert np.isfinite(named).all()
    broken = Retriever(retriever.encoder, load_tokenizer(folder), SETTINGS)  # control
    with pytest.raises(IndexError):
        embed_texts(broken, TEXTS, "query")


@pytest.mark.parametrize("kind", ["llama_lora", "llama_full"])
def test_an_export_of_it_pads_with_the_end_token_too(kind: str, tmp_path: Path) -> None:
    made = make(CASES[kind], tmp_path / "base")
    folder = made.base.folder
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"extra {i}" for i in range(330 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    export = made.write(tmp_path / "export", tokenizer=model_tokenizer(folder), merged=False)
    assert json.loads((export / "tokenizer_config.json").read_text())["pad_token"] == "</s>"
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(export), device="cpu", local_files_only=True).encode_query(TEXTS)
    own = embed_texts(load_export(export, "cpu"), TEXTS, "query")
    np.testing.assert_allclose(own, theirs, rtol=0, atol=1e-6 if kind == "llama_lora" else 2e-2)


SPECIAL = ("eos_token", "bos_token", "unk_token", "cls_token", "sep_token", "mask_token")


@pytest.mark.parametrize("role", [*SPECIAL, None])
def test_any_other_token_without_an_embedding_is_one_line(role: str | None, tmp_path: Path) -> None:
    tokenizer = small_tokenizer("bos")
    tokenizer.add_tokens([f"extra {i}" for i in range(330 - len(tokenizer))])
    tokenizer.add_special_tokens({role: "<|new|>"}) if role else tokenizer.add_tokens(["<|new|>", "<|newer|>"])
    folder = model(tmp_path / "m", 330, tokenizer)
    for load in (
        lambda: model_tokenizer(folder),
        lambda: vectors(folder),
        lambda: load_any(
            str(folder), None, EvalSettings(pooling="mean", normalize=True, max_tokens=16), torch.device("cpu")
        ),
    ):
        with pytest.raises((ValueError, RecipeError)) as caught:
            load()
        line = str(caught.value)
        count, shown = (1, "'<|new|>' 330") if role else (2, "'<|new|>' 330, '<|newer|>' 331")
        assert line.startswith(
            f"{folder}: {count} of the tokenizer's {330 + count} tokens have ids ({shown}) for which "
        )
        assert "the model has no embedding, as config.json says vocab_size 330; put the tokenizer beside" in line


def test_a_padding_token_that_texts_get_too_is_refused(tmp_path: Path) -> None:
    tokenizer = small_tokenizer("bos")
    tokenizer.add_tokens([f"extra {i}" for i in range(330 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "<|end|>", "eos_token": "<|end|>"})
    with pytest.raises(ValueError, match=r"1 of the tokenizer's 331 tokens have ids \('<\|end\|>' 330\)"):
        model_tokenizer(model(tmp_path / "m", 330, tokenizer))


def test_a_tokenizer_of_a_larger_model_is_refused_with_the_counts(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "llama")  # of 96 tokens
    small_tokenizer("bos").save_pretrained(folder)
    with pytest.raises(ValueError, match=r"tokens have ids \('.*' 96, .*\) for which .* vocab_size 96; put "):
        model_tokenizer(folder)
