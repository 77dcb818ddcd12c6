"""Crops, the store of documents, the order of chunks and the batches."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from toolkit.data.tokens import Tokens, frame, pad
from toolkit.data.train_tokenizer import train_tokenizer
from toolkit.determinism import generator
from toolkit.methods.recontriever.crops import (
    CropBatch,
    CropPlan,
    CropStore,
    collate_crops,
    crop,
    draw,
    write_documents,
)
from toolkit.methods.recontriever.keys import Crops
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.models import BuildTokenizer

FRAME = ([101], [102])


def settings(**changes: Any) -> Crops:
    return Crops.model_validate({"chunk_tokens": 16, "min_ratio": 0.1, "max_ratio": 0.5, "delete": 0.1} | changes)


def make_store(folder: Path, *lengths: int) -> CropStore:
    """Documents of the given lengths; every token id is its place in the stream, from 1000 on, so it tells all."""
    ends = 1000 + np.cumsum([0, *lengths])
    rows = [(f"text {i}", list(range(*ends[i : i + 2]))) for i in range(len(lengths))]
    folder.mkdir(exist_ok=True)
    write_documents(rows, folder)
    return CropStore.open(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> CropStore:
    return make_store(tmp_path_factory.mktemp("store"), *np.random.default_rng(0).integers(1, 90, 60).tolist())


def collate(plan: CropPlan, t: int, crops: Crops, first: int = 0, last: int | None = None, **how: Any) -> CropBatch:
    rows = plan.pool(t)
    part = slice(first, last)
    how = {"views": 3, "frame": FRAME, "seed": 7, "pad_id": 0, "max_tokens": 512} | how
    return collate_crops(plan, rows[part], t, np.arange(len(rows))[part], crops=crops, **how)


def texts(tokens: Tokens) -> list[list[int]]:
    """The ids of each row; checks that all its padding, and nothing else, is masked."""
    lengths = tokens.attention_mask.sum(1)
    assert torch.equal(tokens.attention_mask, (torch.arange(tokens.input_ids.shape[1]) < lengths[:, None]).long())
    assert not tokens.input_ids[tokens.attention_mask == 0].any()
    return [row[:n].tolist() for row, n in zip(tokens.input_ids, lengths, strict=True)]


def all_texts(batch: CropBatch) -> list[list[list[int]]]:
    """[rows][1 + views] texts."""
    queries, keys = texts(batch.query), texts(batch.key)
    return [[query, *keys[row :: len(queries)]] for row, query in enumerate(queries)]


def flat(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


# --------------------------------------------------------------------------- one crop


def test_the_length_is_rounded_down_but_never_to_nothing():
    tokens, ones = np.arange(48), np.ones(48)
    assert [len(crop(tokens, ratio, 0, ones, 0.5)) for ratio in (1.0, 0.5, 0.49, 0.05, 1e-9)] == [48, 24, 23, 2, 1]
    assert crop(tokens, 0.1, 44, ones, 0.5).tolist() == [44, 45, 46, 47]


def test_draws_keep_to_the_ratios_and_reach_every_start():
    crops = settings(min_ratio=0.2, max_ratio=0.4)
    drawn = draw(generator("test", 1), 200, crops, 5000)
    lengths = [
        len(crop(np.arange(200), r, s, u, 0.0)) for r, s, u in zip(drawn.ratio, drawn.start, drawn.uniform, strict=True)
    ]
    assert min(lengths) == 40 and max(lengths) == 79
    fixed = draw(generator("test", 2), 8, settings(min_ratio=0.5, max_ratio=0.5), 4000)
    counts = np.bincount(fixed.start)
    assert len(counts) == 5 and abs(counts / 4000 - 0.2).max() < 0.03  # without the last start there were 4
    assert draw(generator("test", 3), 8, settings(min_ratio=1, max_ratio=1), 9).start.tolist() == [0] * 9


def test_tokens_are_left_out_as_often_as_asked():
    for delete in (0.0, 0.1, 0.6):
        drawn = draw(generator("test", 4), 100, settings(min_ratio=1, max_ratio=1), 1000)
        kept = [len(crop(np.arange(100), 1.0, 0, uniform, delete)) for uniform in drawn.uniform]
        assert abs(1 - np.mean(kept) / 100 - delete) < 0.005


# --------------------------------------------------------------------------- store


def test_the_store_gives_back_ids_and_examples(tmp_path: Path):
    rows = [("é" * 3000, [5, 6, 7]), ("", []), *[(f"text {i}", [i]) for i in range(10)]]
    write_documents(iter(rows), tmp_path)
    store = CropStore.open(tmp_path)
    assert [store.documents[i].tolist() for i in range(12)] == [ids for _, ids in rows]
    assert store.meta["documents"] == 12 and store.meta["tokens"] == 13
    assert store.examples == ["é" * 2000, "", *[f"text {i}" for i in range(6)]]


def test_the_digest_is_of_texts_and_ids(tmp_path: Path):
    def digest(*rows: tuple[str, list[int]]) -> str:
        write_documents(rows, tmp_path)
        return CropStore.open(tmp_path).digest

    first = digest(("ab", [1, 2]), ("c", [3]))
    assert digest(("ab", [1, 2]), ("c", [3])) == first
    others = [[("a", [1, 2]), ("bc", [3])], [("ab", [1]), ("c", [2, 3])], [("c", [3]), ("ab", [1, 2])]]
    assert len({first, *(digest(*rows) for rows in others)}) == 4


def test_an_unfinished_store_does_not_open(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        CropStore.open(tmp_path)


# --------------------------------------------------------------------------- plan


def test_documents_are_cut_into_nearly_equal_windows(tmp_path: Path):
    lengths = [3, 4, 16, 17, 0, 50, 2, 161]
    store = make_store(tmp_path, *lengths)
    plan = CropPlan(store, settings(), 2, seed=1)
    assert plan.left_out == 3 and plan.chunks == 1 + 1 + 2 + 4 + 11
    found = [plan.chunk(0, number).tolist() for number in range(plan.chunks)]
    assert [len(chunk) for chunk in found[:8]] == [4, 16, 8, 9, 12, 13, 12, 13]
    assert {len(chunk) for chunk in found[8:]} == {14, 15}
    kept = [row for row, n in enumerate(lengths) if n >= 4]
    assert flat(found) == flat(store.documents[row].tolist() for row in kept)


@pytest.mark.parametrize("across", [False, True])
def test_an_epoch_deals_each_chunk_at_most_once_and_drops_less_than_a_pool(store: CropStore, across: bool):
    plan = CropPlan(store, settings(across_documents=across), 7, seed=2)
    for epoch in range(3):
        numbers = np.concatenate([plan.pool(epoch * plan.pools_per_epoch + i) for i in range(plan.pools_per_epoch)])
        assert len(set(numbers.tolist())) == len(numbers) and 0 <= plan.chunks - len(numbers) < 7
        assert numbers.min() >= 0 and numbers.max() < plan.chunks + across


@pytest.mark.parametrize("across", [False, True])
def test_pool_t_is_a_pure_function_of_seed_and_t(store: CropStore, across: bool):
    one, other = (CropPlan(store, settings(across_documents=across), 8, seed=4) for _ in range(2))

    def ids(plan: CropPlan, t: int) -> list[list[int]]:
        return [plan.chunk(t, number).tolist() for number in plan.pool(t).tolist()]

    last = 4 * one.pools_per_epoch
    forwards = [ids(one, t) for t in range(last)]
    assert forwards == [ids(other, t) for t in reversed(range(last))][::-1]
    assert forwards[: one.pools_per_epoch] != forwards[one.pools_per_epoch : 2 * one.pools_per_epoch]
    assert forwards != [ids(CropPlan(store, settings(across_documents=across), 8, seed=5), t) for t in range(last)]


def test_chunks_stay_in_their_document_unless_all_text_is_one_stream(store: CropStore):
    ends = store.documents.offsets + 1000

    def crosses(across: bool) -> int:
        plan = CropPlan(store, settings(across_documents=across), 8, seed=6)
        chunks = [plan.chunk(t, number) for t in range(plan.pools_per_epoch) for number in plan.pool(t).tolist()]
        assert all((np.diff(chunk) == 1).all() and len(chunk) <= 16 for chunk in chunks)
        assert not across or {len(chunk) for chunk in chunks} == {16}
        return sum(np.searchsorted(ends, c[0], "right") != np.searchsorted(ends, c[-1], "right") for c in chunks)

    assert crosses(False) == 0
    assert crosses(True) > 10


@pytest.mark.parametrize("total", [79, 80, 94, 95])
def test_the_stream_s_offset_changes_and_every_id_is_reached(tmp_path: Path, total: int):
    plan = CropPlan(make_store(tmp_path, total - 2, 2), settings(across_documents=True), 1, seed=8)
    assert plan.chunks == (total - 15) // 16
    firsts, seen = set(), set()
    for t in range(200 * plan.pools_per_epoch):
        if t % plan.pools_per_epoch == 0:
            firsts.add(int(plan.chunk(t, 0)[0]) - 1000)
        seen |= {i for number in plan.pool(t).tolist() for i in plan.chunk(t, number).tolist()}
    assert firsts == set(range(16)) and seen == set(range(1000, 1000 + total))


def test_a_pool_above_the_chunks_is_refused_with_numbers_and_fix(tmp_path: Path):
    store = make_store(tmp_path, 3, 32, 10)
    message = (
        r"batch.pool: 4 is more than the data's 3 chunks of up to 16 tokens \(1 documents under 4 tokens left out\)"
    )
    with pytest.raises(RecipeError, match=message + "; lower it or add data"):
        CropPlan(store, settings(), 4, seed=1)
    assert CropPlan(store, settings(), 3, seed=1).pools_per_epoch == 1
    with pytest.raises(RecipeError, match="4 is more than the data's 1 chunks of up to 16 tokens; lower"):
        CropPlan(store, settings(across_documents=True), 4, seed=1)
    with pytest.raises(RecipeError, match="2 is more than the data's 0 chunks"):
        CropPlan(store, settings(chunk_tokens=64, across_documents=True), 2, seed=1)


# --------------------------------------------------------------------------- batches


@pytest.mark.parametrize("across", [False, True])
def test_a_batch_is_what_its_draws_say(store: CropStore, across: bool):
    crops = settings(across_documents=across, max_ratio=0.9, delete=0.3)
    plan = CropPlan(store, crops, 12, seed=9)
    for t in (0, plan.pools_per_epoch + 1):
        batch = collate(plan, t, crops)
        assert batch.document.tolist() == plan.pool(t).tolist() and batch.document.dtype == torch.int64
        assert batch.query.input_ids.shape == (12, batch.key.input_ids.shape[1]) and len(batch.key.input_ids) == 36
        expected: list[list[list[int]]] = []
        for place, number in enumerate(plan.pool(t).tolist()):
            chunk = plan.chunk(t, number)
            drawn = draw(generator("crops", 7, t, place), len(chunk), crops, 4)
            views = [crop(chunk, drawn.ratio[v], drawn.start[v], drawn.uniform[v], 0.3).tolist() for v in range(4)]
            expected.append([[101, *view, 102] for view in views])
        assert all_texts(batch) == expected
        reference = pad([expected[row][1 + view] for view in range(3) for row in range(12)], 0)
        width = reference.input_ids.shape[1]
        assert torch.equal(batch.key.input_ids[:, :width], reference.input_ids)
        assert not torch.equal(reference.input_ids, reference.input_ids.reshape(3, 12, -1).swapaxes(0, 1).flatten(0, 1))


@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_do_not_depend_on_how_ranks_divide_them(store: CropStore, ranks: int):
    crops = settings()
    plan = CropPlan(store, crops, 12, seed=10)
    whole, each = all_texts(collate(plan, 5, crops)), 12 // ranks
    parts = [collate(plan, 5, crops, each * r, each * (r + 1)) for r in range(ranks)]
    assert flat(map(all_texts, parts)) == whole
    assert torch.cat([part.document for part in parts]).tolist() == plan.pool(5).tolist()
    own_places = [
        collate_crops(
            plan, plan.pool(5)[each * r :][:each], 5, np.arange(each), crops=crops, views=3, frame=FRAME, seed=7,
            pad_id=0, max_tokens=512,
        )
        for r in range(ranks)
    ]  # fmt: skip
    assert flat(map(all_texts, own_places)) != whole  # the place is that in the pool, not in the rank's part


def test_every_view_pool_and_seed_has_its_own_draws(tmp_path: Path):
    crops = settings(delete=0.0, chunk_tokens=400)
    plan = CropPlan(make_store(tmp_path, 400, 400), crops, 2, seed=11)
    batches = [all_texts(collate(plan, t, crops, seed=seed)) for seed in (1, 2) for t in (0, 1)]
    seen = [tuple(text) for batch in batches for row in batch for text in row]
    assert len(set(seen)) == len(seen) == 32
    again = [all_texts(collate(plan, t, crops, seed=seed)) for seed in (1, 2) for t in (0, 1)]
    assert again == batches


def test_crops_are_cut_to_max_tokens_with_their_special_ids(store: CropStore):
    crops = settings(min_ratio=1.0, max_ratio=1.0, delete=0.0)
    plan = CropPlan(store, crops, 6, seed=12)
    long, short = (all_texts(collate(plan, 0, crops, max_tokens=n)) for n in (512, 7))
    assert max(len(text) for row in short for text in row) == 7
    for whole, cut in zip(flat(long), flat(short), strict=True):
        assert cut == [*whole[:-1][:6], 102]
    with pytest.raises(ValueError, match="max_tokens 2 leaves no room beside 2 special ids"):
        collate(plan, 0, crops, max_tokens=2)


def test_a_crop_without_tokens_keeps_its_special_ids_or_else_its_first_token(store: CropStore):
    crops = settings(min_ratio=0.01, max_ratio=0.01, delete=0.9)  # one token before deletion
    plan = CropPlan(store, crops, 24, seed=13)
    framed = flat(all_texts(collate(plan, 0, crops)))
    bare = flat(all_texts(collate(plan, 0, crops, frame=([], []))))
    assert {len(text) for text in framed} == {2, 3} and {len(text) for text in bare} == {1}
    assert all(a[1:-1] in ([], b) and b[0] >= 1000 for a, b in zip(framed, bare, strict=True))
    only_empty = collate(plan, 0, crops.model_copy(update={"delete": 0.999999}))
    assert only_empty.key.input_ids.tolist() == [[101, 102]] * 72


def bert_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", *[f"w{i}" for i in range(50)]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )


def test_special_ids_are_those_of_the_tokenizer(store: CropStore):
    llama = train_tokenizer(BuildTokenizer(vocab_size=300, pieces="text"), iter(["a b c"]))
    bos, eos = llama.bos_token_id, llama.eos_token_id
    crops = settings(delete=0.5)
    plan = CropPlan(store, crops, 12, seed=14)
    bert = [(bert_tokenizer(), None, [2], [3]), (bert_tokenizer(), False, [2], [])]
    cases = [*bert, (llama, True, [bos], [eos]), (llama, False, [bos], []), (llama, None, [bos], [])]
    for tokenizer, append_eos, before, after in cases:
        assert frame(tokenizer, append_eos) == (before, after)
        for text in flat(all_texts(collate(plan, 0, crops, frame=frame(tokenizer, append_eos)))):
            body = text[1 : len(text) - len(after)]
            assert text == [*before, *body, *after] and all(i >= 1000 for i in body)
