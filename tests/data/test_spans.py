"""Passages, the store, the order of training and its batches."""

import re
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from toolkit.data.spans import PassageStore, PoolPlan, cut, write_store
from toolkit.data.train_tokenizer import train_tokenizer
from toolkit.methods.language_model.rows import collate_language_model
from toolkit.methods.revela.keys import NearDuplicates
from toolkit.methods.revela.near_duplicates import signatures
from toolkit.methods.revela.rows import collate_revela
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.models import BuildTokenizer, EncoderSettings

# --------------------------------------------------------------------------- cut

PROSE = (
    'Dr. A. Smith met 3.5 people, e.g. Ms. Lee. She left! "Why?" he asked. (Nobody knew.) Then\nnothing\n\nA new start'
)


def test_sentences_are_cut_whole():
    assert cut(PROSE, "sentences", 9) == [
        "Dr. A. Smith met 3.5 people, e.g. Ms. Lee.",
        'She left! "Why?" he asked. (Nobody knew.) Then\nnothing',
        "A new start",
    ]
    assert cut(PROSE, "sentences", 10_000) == [PROSE]


def test_as_many_sentences_as_fit():
    text = "One two. Three four. Five six. Seven eight nine ten eleven. Twelve."
    assert cut(text, "sentences", 4) == ["One two. Three four.", "Five six.", "Seven eight nine ten", "eleven. Twelve."]


@pytest.mark.parametrize("unit", ["sentences", "lines"])
@pytest.mark.parametrize("most", [1, 2, 3, 7, 50])
def test_no_word_is_lost_and_none_too_many(unit, most):
    text = PROSE + "\n" + "word " * 23 + "\r\n\tif x:\n\n        pass"
    passages = cut(text, unit, most)
    assert " ".join(passages).split() == text.split()
    assert max(len(p.split()) for p in passages) <= most
    assert all(p in text for p in passages)


def test_lines_keep_their_indent_and_empty_passages_go():
    text = "\n\n    def f(x):\n        return x\n\n\n    # ----\n\n    def g():\n        pass\n"
    assert cut(text, "lines", 4) == ["    def f(x):\n        return x", "    # ----\n\n    def g():", "        pass"]
    assert cut("***\n---\n___\n", "lines", 1) == cut(" \n", "lines", 5) == cut("", "sentences", 5) == []


# --------------------------------------------------------------------------- store


def test_store_gives_back_every_text_across_record_batches(tmp_path: Path):
    rows = [(f"text {i} é\n\t" * (i % 3 + 1), i // 7) for i in range(20_000)]
    write_store(iter(rows), tmp_path, "documents")
    store = PassageStore.open(tmp_path)
    assert len(store) == 20_000 and store.group_size is None
    assert store.meta["documents"] == 20_000 // 7 + 1 and store.meta["passages"] == 20_000
    assert store.document.dtype == np.int64 and store.document.tolist() == [document for _, document in rows]
    ids = np.array([19_999, 0, 8191, 8192, 8192, 16_384])
    assert store.texts(ids) == [rows[i][0] for i in ids]


def test_digest_is_of_texts_and_documents(tmp_path: Path):
    def digest(*rows: tuple[str, int]) -> str:
        write_store(rows, tmp_path, "documents")
        return PassageStore.open(tmp_path).digest

    first = digest(("ab", 0), ("c", 0))
    assert digest(("ab", 0), ("c", 0)) == first
    assert len({first, digest(("a", 0), ("bc", 0)), digest(("ab", 0), ("c", 1)), digest(("c", 0), ("ab", 0))}) == 4


def test_an_unfinished_store_does_not_open(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        PassageStore.open(tmp_path)


# --------------------------------------------------------------------------- plan


def documents(*lengths: int) -> np.ndarray:
    return np.repeat(np.arange(len(lengths)), lengths)


def epoch(plan: PoolPlan, number: int) -> np.ndarray:
    n = plan.pools_per_epoch
    return np.stack([plan.pool(t) for t in range(number * n, (number + 1) * n)])


def test_equal_documents_are_dealt_as_the_paper_deals_them():
    """Pools of 2 x 3 passages from 2 documents in turn: d11, d21, d12, d22, d13, d23."""
    document = documents(*[3] * 8)
    plan = PoolPlan(document, None, 6, 2, seed=1)
    assert plan.pools_per_epoch == 4
    for pool in epoch(plan, 0):
        one, other = pool[::2], pool[1::2]
        assert one.tolist() == (one[0] + np.arange(3)).tolist() and other.tolist() == (other[0] + np.arange(3)).tolist()
        assert one[0] % 3 == other[0] % 3 == 0 and one[0] != other[0]


def test_every_pool_mixes_the_documents_however_unequal_they_are():
    random = np.random.default_rng(0)
    document = documents(*random.geometric(0.1, size=3000))
    plan = PoolPlan(document, None, 16, 4, seed=5)
    mixed = [len(set(document[pool])) for pool in epoch(plan, 0)]
    assert min(mixed) >= 4
    assert [len(set(document[pool])) for pool in epoch(PoolPlan(document, None, 16, 1, seed=5), 0)].count(1) > 0


def test_an_epoch_deals_each_passage_at_most_once_and_drops_less_than_a_tail():
    document = documents(*[1, 9, 2, 30, 5, 4, 11, 3, 8, 6])
    for pool, interleave in ((4, 2), (5, 3), (16, 10), (79, 1)):
        plan = PoolPlan(document, None, pool, interleave, seed=2)
        for number in (0, 1):
            rows = epoch(plan, number).ravel()
            assert len(set(rows.tolist())) == len(rows) and set(rows.tolist()) <= set(range(len(document)))
            assert len(document) - len(rows) < pool + interleave


def test_pool_t_is_a_pure_function_of_seed_and_t():
    document = documents(*range(1, 60))
    one, other = (PoolPlan(document, None, 8, 3, seed=4) for _ in range(2))
    last = 3 * one.pools_per_epoch + 1
    forwards = [one.pool(t).tolist() for t in range(last)]
    backwards = [other.pool(t).tolist() for t in reversed(range(last))][::-1]
    assert forwards == backwards
    n = one.pools_per_epoch
    assert forwards[:n] != forwards[n : 2 * n]  # every epoch has its own order
    assert PoolPlan(document, None, 8, 3, seed=5).pool(0).tolist() != forwards[0]


def test_groups_are_joined_whole():
    document = documents(*[4] * 10)
    plan = PoolPlan(document, 4, 8, None, seed=1)
    assert plan.pools_per_epoch == 5
    pools = epoch(plan, 0)
    assert sorted(pools.ravel().tolist()) == list(range(40))
    assert all(np.bincount(document[pool], minlength=10).max() == 4 and len(set(document[pool])) == 2 for pool in pools)
    assert PoolPlan(document, 4, 12, None, seed=1).pools_per_epoch == 3  # one group is left over


def test_groups_are_cut_into_pools():
    document = documents(*[6] * 5)
    plan = PoolPlan(document, 6, 2, None, seed=1)
    pools = epoch(plan, 0)
    assert len(pools) == plan.pools_per_epoch == 15
    assert sorted(pools.ravel().tolist()) == list(range(30))
    assert all(len(set(document[pool])) == 1 for pool in pools)
    assert epoch(plan, 1).tolist() != pools.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((documents(3, 4), None, 8, 1), "8 passages are more than the data's 7"),
        ((documents(3, 4), None, 4, 3), "interleave: 3 documents are more than the data's 2"),
        ((documents(3, 4), None, 7, 2), "7 is above the 6 passages that 2 equal lanes hold"),
        (
            (documents(*[16] * 3), 16, 6, None),
            "does not fit groups of 16 passages; use 2, 4, 8, 16 or a multiple of 16",
        ),
    ],
)
def test_what_cannot_be_planned_is_said_with_both_numbers(arguments, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        PoolPlan(*arguments, seed=0)


# --------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(BuildTokenizer(vocab_size=300, pieces="text"), iter(["some words of text"] * 3))


def ids(tokens, row: int) -> list[int]:
    return tokens.input_ids[row, : int(tokens.attention_mask[row].sum())].tolist()


def test_revela_sides_have_prefix_half_cut_and_end_token(tokenizer):
    encoder = EncoderSettings(
        pooling="eos",
        normalize=True,
        append_eos=True,
        query_prefix="q: ",
        passage_prefix="p: ",
        max_tokens=12,
        eval_max_tokens=12,
    )
    texts = ["xyz", "a much longer text than fits"]
    settings = {"tokenizer": tokenizer, "lm_tokenizer": tokenizer, "encoder": encoder, "lm_max_tokens": 9}
    batch = collate_revela(texts, np.array([7, 9]), half_query=True, near_duplicates=None, **settings)
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    for row, text in enumerate(texts):
        passage, query = (tokenizer(prefix + text)["input_ids"][:11] for prefix in ("p: ", "q: "))
        assert ids(batch.passage, row) == [*passage, eos]
        assert ids(batch.query, row) == [*query[: len(query) // 2], eos]
        assert ids(batch.text, row) == tokenizer(text)["input_ids"][:9] and ids(batch.text, row)[0] == bos
    assert batch.document.dtype == torch.int64 and batch.document.tolist() == [7, 9]
    assert batch.signature.shape == (2, 0)
    ngrams = NearDuplicates(ngram=2, threshold=0.5)
    whole = collate_revela(texts, np.array([7, 9]), half_query=False, near_duplicates=ngrams, **settings)
    assert ids(whole.query, 0) == [*tokenizer("q: xyz")["input_ids"], eos]
    assert whole.signature.equal(signatures([ids(whole.text, row) for row in range(2)], 2))  # of the text, cut


def test_language_model_reads_the_text_as_it_is(tokenizer):
    batch = collate_language_model(["ab", "abc"], np.array([0, 0]), tokenizer, max_tokens=3)
    assert [ids(batch.text, row) for row in range(2)] == [tokenizer(text)["input_ids"][:3] for text in ("ab", "abc")]
    assert tokenizer.eos_token_id not in batch.text.input_ids[batch.text.attention_mask.bool()]


@pytest.mark.parametrize("unit", ["sentences", "lines"])
@pytest.mark.parametrize(
    "text",
    ["\n" * 1_000_000, "a" + " " * 400_000 + "b", "a\r\n" + "\r\n" * 200_000 + "b", " \n" * 200_000, "." * 400_000],
    ids=["empty lines", "spaces", "windows lines", "blank lines", "marks"],
)
def test_time_follows_the_length_of_a_text(text: str, unit: Literal["sentences", "lines"]):
    """Empty lines, and white space within a line, took the square of their number: minutes for these texts."""
    started = time.process_time()
    assert cut(text, unit, 120) == ([text] if text[0] == "a" else [])
    assert time.process_time() - started < 15
