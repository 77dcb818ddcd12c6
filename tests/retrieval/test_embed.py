"""Embedding: order, batches, prefixes, ranks, and vectors that must not pass."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from beir import write_beir
from distributed import run_on_ranks
from peft.tuners.lora import LoraLayer
from retrievers import ragged_texts, tiny_retriever
from tiny import save_model
from tiny_retriever import CASES, TEXTS, make

from eval.evaluate import evaluate
from toolkit.data.tokens import Tokens, pad, tokenize
from toolkit.export.write import load_export
from toolkit.models.retriever import load_retriever
from toolkit.retrieval import embed
from toolkit.retrieval.embed import checkpoint_digest, embed_texts, encode
from toolkit.retrieval.vectors import Store


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


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_batches_run_at_once_on_a_cpu(three_threads: None):
    """Each on one of three threads: the first three wait for one another, which they could not in turn."""
    retriever, texts = tiny_retriever(), ragged_texts(37)
    together, met, threads = threading.Barrier(3, timeout=60), [], []

    def meet(*_: object) -> None:
        threads.append(torch.get_num_threads())
        if len(threads) <= 3:
            met.append(together.wait())

    hook = retriever.encoder.register_forward_pre_hook(meet)
    vectors = embed_texts(retriever, texts, "passage", 100)
    assert sorted(met) == [0, 1, 2] and set(threads) == {1} and len(threads) > 6
    assert torch.get_num_threads() == 3
    hook.remove()
    expected = np.stack([alone(retriever, text, "w1 ") for text in texts])
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)
    new: list[int] = []
    later = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert new == [3]  # what else is started in the process has all threads


def test_batches_run_in_turn_where_one_changes_the_model(three_threads: None):
    """A rotary embedding that follows the lengths it meets; and one batch has all threads."""
    retriever, threads = tiny_retriever(), []
    retriever.encoder.register_forward_pre_hook(lambda *_: threads.append(torch.get_num_threads()))
    embed_texts(retriever, ["w5 w6"], "query")
    retriever.encoder.backbone.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    embed_texts(retriever, ragged_texts(37), "passage", 100)
    assert set(threads) == {3} and len(threads) > 6


def test_a_batch_that_fails_beside_others_is_told(three_threads: None):
    retriever = tiny_retriever()

    def fail(_: object, tokens: tuple[Tokens]) -> None:
        if tokens[0].input_ids.shape[1] < 10:
            raise ValueError("no room for it")

    retriever.encoder.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="no room for it"):
        embed_texts(retriever, ragged_texts(37), "passage", 100)
    assert torch.get_num_threads() == 3


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
@pytest.mark.parametrize("on_disk", [False, True])
def test_ranks_give_the_vectors_of_one_process(world_size: int, on_disk: bool, tmp_path):
    """23 texts make several shards; 3 texts make one, so that the other ranks have nothing to do."""
    counts = [23, 3]
    request = {"counts": counts, "folder": str(tmp_path / "vectors") if on_disk else None}
    answer = run_on_ranks("embed_ranks.py", world_size, request, tmp_path)
    for count, per_rank in zip(counts, answer["vectors"], strict=True):
        expected = embed_texts(tiny_retriever(), ragged_texts(count), "passage")
        assert len(per_rank) == world_size
        for vectors in per_rank:
            np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)
        assert np.abs(np.roll(expected, 1, axis=0) - per_rank[0]).max() > 0.1  # control: in another order
    problem = "vectors of 1 texts (as passage) are not finite: bad"
    assert answer["problems"] == [problem] * world_size  # one rank met it
    assert answer["lost"] == ["lost 00000.npy" if on_disk else ""] * world_size  # one rank does not see the shards


@pytest.mark.parametrize("size", [1, 40, 300, 10**9])
def test_shards_hold_every_different_text_once_and_equal_work(size: int, monkeypatch):
    monkeypatch.setattr(embed, "SHARD_CHARACTERS", size)
    monkeypatch.setattr(embed, "SHARD_ROWS", 8)
    monkeypatch.setattr(embed, "SHARDS", 10**9)
    texts = ragged_texts(30) + ragged_texts(30)[5:9]
    first, parts = embed._plan(texts, max_tokens=10)
    assert sorted(np.concatenate(parts)) == list(range(30))
    assert first.tolist() == [*range(30), 5, 6, 7, 8]
    lengths = [len(texts[i]) for part in parts for i in part]
    assert lengths == sorted(lengths, reverse=True)
    work = [sum(min(len(texts[i]), 40) + 1 for i in part) for part in parts]
    assert max(work) <= size + 41 and max(map(len, parts)) <= 8
    assert len(parts) == {1: 30, 10**9: 4}.get(size, len(parts))


def test_vectors_that_are_not_finite_are_an_error_with_their_ids():
    retriever, texts = tiny_retriever(), {"a": "w5 w6", "b": "w7", "c": "w8", "d": "w7"}
    encode(retriever, texts, "passage")  # control
    with torch.no_grad():
        retriever.encoder.backbone.embed_tokens.weight[3 + 7] = torch.nan
    with pytest.raises(ValueError, match=r"vectors of 1 texts \(as passage\) are not finite: b$"):
        encode(retriever, texts, "passage")
    with torch.no_grad():
        retriever.encoder.backbone.embed_tokens.weight[3 + 1] = torch.inf  # of the prefix
    with pytest.raises(ValueError, match=r"of 7 texts .* are not finite: t\d, t\d, t\d, t\d, t\d, \.\.\.$"):
        encode(retriever, {f"t{i}": f"w{i + 20}" for i in range(7)}, "passage")


def test_a_collapsed_retriever_is_an_error_unless_training_starts_from_it(tmp_path, capsys):
    retriever, texts = tiny_retriever(), {"a": "w5 w6", "b": "w7", "c": "w8"}
    encode(retriever, texts, "passage")  # control: vectors that differ
    with torch.no_grad():
        retriever.encoder.backbone.embed_tokens.weight.fill_(1.0)
    assert (embed_texts(retriever, ["w5", "w5"], "passage") == embed_texts(retriever, ["w5"], "passage")).all()
    problem = "collapsed retriever: all 3 different texts (as passage) got one vector (a, b, c)"
    with pytest.raises(ValueError) as error:
        encode(retriever, texts, "passage")
    assert str(error.value) == f"{problem}; no order of them means anything"
    assert capsys.readouterr().err == ""
    vectors = encode(retriever, texts, "passage", may_collapse=True).array()
    assert np.abs(vectors - vectors[0]).max() < 1e-6 < np.abs(vectors).max()
    assert capsys.readouterr().err == f"warning: {problem}; their order means nothing\n"
    suite, out = str(write_beir(tmp_path / "small")), tmp_path / "out"
    with pytest.raises(ValueError, match=r"collapsed retriever: all .* different texts"):
        evaluate(retriever, [suite], out, label="", step=None)
    scores = evaluate(retriever, [suite], out, label="", step=None, may_collapse=True)
    assert 0 <= scores["small:test"]["ndcg_at_10"] < 1
    assert capsys.readouterr().err.count("warning: collapsed retriever") == 2  # passages and queries


@pytest.mark.parametrize("texts", [("w1 w2", "w1  w2"), ("w5 " * 50, "w5 " * 60, "w5 " * 70), ("no", "No", "NO")])
def test_texts_that_the_model_reads_alike_are_no_collapse(texts: tuple[str, ...], tmp_path):
    """Unknown words are one token, as case is to an uncased tokenizer."""
    retriever = tiny_retriever()
    store = Store(tmp_path, checkpoint_digest(retriever), "fp16")
    numbered = dict(zip("abc", texts, strict=False))
    for kept in (None, store):
        vectors = encode(retriever, numbered, "query", kept).array()
        assert len(vectors) > 1 and np.abs(vectors - vectors[0]).max() < 1e-6
    with torch.no_grad():
        retriever.encoder.backbone.embed_tokens.weight.fill_(1.0)
    with pytest.raises(ValueError, match="collapsed retriever"):  # one text more, and it is
        encode(retriever, numbered | {"d": "w9"}, "query")


def test_vectors_that_are_close_but_differ_are_no_collapse():
    """A mean of equal words and one that differs: cosines above 0.999, whose order still means something."""
    retriever = tiny_retriever()
    with torch.no_grad():
        weight = retriever.encoder.backbone.embed_tokens.weight
        weight.copy_(weight[0] + 1e-3 * weight)
    vectors = encode(retriever, {str(i): f"w{i}" for i in range(9)}, "passage").array()
    assert 0.999 < (vectors @ vectors.T).min() < 1 - 1e-9


def test_the_digest_is_of_all_that_decides_the_vectors(tmp_path):
    folder = make(CASES["bert_lora"], tmp_path / "base").write(tmp_path / "export", merged=False)
    digests = [checkpoint_digest(retriever) for retriever in (load_export(folder, "cpu"), load_export(folder, "cpu"))]
    retriever = load_export(folder, "cpu")
    embed_texts(retriever, TEXTS, "query")  # the tokenizer remembers how it was last called
    assert digests == [checkpoint_digest(retriever)] * 2
    for change in ({"query_prefix": "w5 "}, {"eval_max_tokens": 47}, {"pooling": "eos"}, {"normalize": False}):
        digests.append(checkpoint_digest(tiny_retriever(**change)))
    digests.append(checkpoint_digest(tiny_retriever()))
    other = tiny_retriever()
    other.tokenizer.add_tokens(["new"])
    digests.append(checkpoint_digest(other))
    digests.append(checkpoint_digest(other._replace(encoder=other.encoder.to(torch.bfloat16))))
    with torch.no_grad():
        next(other.encoder.parameters())[0, 0] += 1
    digests.append(checkpoint_digest(other))
    other.encoder.backbone.config.rms_norm_eps = 0.5
    digests.append(checkpoint_digest(other))
    for module in retriever.encoder.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= 2
    digests.append(checkpoint_digest(retriever))
    assert len(set(digests)) == len(digests) - 1


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
