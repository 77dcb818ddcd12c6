"""Embedding: order, batches, prefixes, ranks, and vectors that must not pass."""

import numpy as np
import pytest
import torch
from beir import write_beir
from distributed import run_on_ranks
from retrievers import ragged_texts, tiny_retriever
from tiny import save_model
from tiny_retriever import CASES, TEXTS, make

from eval.evaluate import evaluate
from toolkit.data.tokens import Tokens, pad, tokenize
from toolkit.embed import embed_texts, load_retriever


def alone(retriever, text: str, prefix: str) -> np.ndarray:
    """The vector of one text in a batch of its own, without padding."""
    settings = retriever.settings
    rows = tokenize(retriever.tokenizer, [text], prefix, settings.eval_max_tokens, settings.append_eos)
    with torch.inference_mode():
        return retriever.encoder(pad(rows, 2))[0].numpy()


@pytest.mark.parametrize("pooling", ["mean", "eos"])
@pytest.mark.parametrize("tokens_per_batch", [1, 100, 16384])
def test_batches_do_not_change_the_vectors(pooling: str, tokens_per_batch: int):
    retriever, texts = tiny_retriever(pooling=pooling), ragged_texts(37)
    vectors = embed_texts(retriever, texts, "passage", tokens_per_batch)
    expected = np.stack([alone(retriever, text, "w1 ") for text in texts])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)
    assert np.abs(vectors[1:] - expected[:-1]).max() > 0.1  # control: in another order they differ


def test_padding_that_is_not_masked_would_be_seen():
    retriever, texts = tiny_retriever(), ragged_texts(8)
    rows = tokenize(retriever.tokenizer, texts, "w1 ", 48, True)
    ids = pad(rows, 2).input_ids
    with torch.inference_mode():
        wrong = retriever.encoder(Tokens(ids, torch.ones_like(ids))).numpy()
    assert np.abs(wrong - embed_texts(retriever, texts, "passage")).max() > 1e-2


def test_prefix_is_that_of_the_kind():
    retriever, texts = tiny_retriever(), ragged_texts(5)
    for kind, prefix in (("query", "w0 "), ("passage", "w1 ")):
        expected = np.stack([alone(retriever, text, prefix) for text in texts])
        np.testing.assert_allclose(embed_texts(retriever, texts, kind), expected, rtol=0, atol=1e-5)


def test_texts_are_cut_at_eval_max_tokens():
    texts = ragged_texts(20)
    short = embed_texts(tiny_retriever(eval_max_tokens=10), texts, "passage")
    cut = embed_texts(tiny_retriever(), [" ".join(text.split()[:8]) for text in texts], "passage")
    np.testing.assert_allclose(short, cut, rtol=0, atol=1e-5)  # prefix + 8 words + end token


def test_identical_texts_run_once():
    retriever, texts = tiny_retriever(), ragged_texts(6)
    rows = []
    retriever.encoder.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    vectors = embed_texts(retriever, [*texts, *texts, texts[2]], "query")
    assert sum(rows) == 6
    assert (vectors[:6] == vectors[6:12]).all()
    assert (vectors[12] == vectors[2]).all()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_give_the_vectors_of_one_process(world_size: int, tmp_path):
    """23 texts share out unevenly; of 3 texts the last of four ranks gets none."""
    counts = [23, 3]
    answer = run_on_ranks("embed_ranks.py", world_size, counts, tmp_path)
    for count, per_rank in zip(counts, answer, strict=True):
        expected = embed_texts(tiny_retriever(), ragged_texts(count), "passage")
        assert len(per_rank) == world_size
        for vectors in per_rank:
            np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)


def test_vectors_that_are_not_finite_are_an_error():
    retriever, texts = tiny_retriever(), ["w5 w6", "w7", "w8"]
    with torch.no_grad():
        retriever.encoder.backbone.embed_tokens.weight[3 + 7] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 3 vectors are not finite; the first texts: \[1\]"):
        embed_texts(retriever, texts, "passage")


def test_a_collapsed_retriever_is_scored_with_a_warning(tmp_path, capsys):
    """A run starts from it or ends with it: the scores, which are those of ties, say how bad it is."""
    retriever, texts = tiny_retriever(), ["w5 w6", "w7", "w8"]
    embed_texts(retriever, texts, "passage")
    assert capsys.readouterr().err == ""  # control: vectors that differ
    with torch.no_grad():
        retriever.encoder.backbone.embed_tokens.weight.fill_(1.0)
    embed_texts(retriever, ["w5", "w5"], "passage")
    assert capsys.readouterr().err == ""  # one text may have one vector
    vectors = embed_texts(retriever, texts, "passage")
    assert np.abs(vectors - vectors[0]).max() < 1e-6 < np.abs(vectors).max()
    assert capsys.readouterr().err == (
        "warning: collapsed retriever: all 3 different texts (as passage) got one vector; their order means nothing\n"
    )
    scores = evaluate(retriever, [str(write_beir(tmp_path / "small"))], tmp_path / "out", label="", step=None)
    assert 0 <= scores["small:test"]["ndcg_at_10"] < 1
    assert capsys.readouterr().err.count("warning: collapsed retriever") == 2  # passages and queries


@pytest.mark.parametrize("name", ["bert_lora", "llama_lora"])
def test_a_folder_with_an_adapter_on_top_gives_the_live_vectors(name: str, tmp_path):
    made = make(CASES[name], tmp_path / "base")
    export = made.write(tmp_path / "export", merged=False)
    for adapter in (export, None):
        retriever = load_retriever(made.base.folder, made.settings, torch.float32, "cpu", adapter)
        same = np.array_equal(embed_texts(retriever, TEXTS, "query"), made.live["query"])
        assert same == (adapter is not None)


def test_evaluation_longer_than_the_positions_is_an_error(tmp_path):
    folder = save_model(tmp_path, "bert")
    settings = tiny_retriever(eval_max_tokens=64).settings
    assert embed_texts(load_retriever(folder, settings, torch.float32, "cpu"), ["a" * 99], "query").shape == (1, 32)
    with pytest.raises(ValueError, match=r"learned positions for 64 tokens; .* at most 64"):
        load_retriever(folder, tiny_retriever(eval_max_tokens=65).settings, torch.float32, "cpu")


def test_no_texts_is_an_error():
    with pytest.raises(ValueError, match="no texts"):
        embed_texts(tiny_retriever(), [], "query")
