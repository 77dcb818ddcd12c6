"""Vectors on disk: found again, taken up after an interruption, never those of other texts, weights or settings."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_on_ranks
from retrievers import ragged_texts, tiny_retriever

from toolkit.retrieval import embed
from toolkit.retrieval.embed import Retriever, checkpoint_digest, encode
from toolkit.retrieval.vectors import Shard, Store, Vectors, blocks, leave, take_rows

TEXTS = {f"t{i}": text for i, text in enumerate(ragged_texts(40, longest=12))} | {
    "copy": ragged_texts(40, longest=12)[3]
}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(embed, "SHARD_CHARACTERS", 200)
    monkeypatch.setattr(embed, "SHARD_ROWS", 7)


@pytest.fixture
def retriever() -> Retriever:
    return tiny_retriever()


def store_of(retriever: Retriever, folder: Path, **changes) -> Store:
    return Store(folder, checkpoint_digest(retriever), **changes)


def encoded(retriever: Retriever, store: Store | None, texts: dict[str, str] = TEXTS) -> tuple[np.ndarray, int]:
    """The vectors as stored, and how many texts the model read for them."""
    rows = []
    hook = retriever.encoder.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    try:
        return encode(retriever, texts, "passage", store).array(), sum(rows)
    finally:
        hook.remove()


def shards_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.npy"))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_finished_encoding_is_found_again(dtype, retriever: Retriever, tmp_path: Path):
    expected, read = encoded(retriever, None)
    assert read == 40
    store = store_of(retriever, tmp_path, dtype=dtype)
    vectors, read = encoded(retriever, store)
    assert read == 40 and len(shards_in(tmp_path)) > 5
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=2**-11 if dtype == "fp16" else 1e-6)
    again, read = encoded(retriever, store)
    assert read == 0
    np.testing.assert_array_equal(again, vectors)
    assert {np.load(path, allow_pickle=False).dtype for path in shards_in(tmp_path)} == {np.dtype(f"float{dtype[2:]}")}
    for shard in encode(retriever, TEXTS, "passage", store).shards:
        assert isinstance(shard.vectors, np.memmap)


def test_an_interrupted_encoding_goes_on(retriever: Retriever, tmp_path: Path):
    """The model fails in its fifth batch, as if the process had been killed there."""
    calls = []

    def fail(module, inputs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    hook = retriever.encoder.register_forward_pre_hook(fail)
    store = store_of(retriever, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        encode(retriever, TEXTS, "passage", store)
    hook.remove()
    finished = sum(len(np.load(path)) for path in shards_in(tmp_path))
    vectors, read = encoded(retriever, store)
    assert 0 < finished < 40 and read == 40 - finished
    np.testing.assert_allclose(vectors, encoded(retriever, None)[0], rtol=0, atol=1e-5)


def test_damaged_shards_are_named_and_encoded_again(retriever: Retriever, tmp_path: Path, capfd):
    store = store_of(retriever, tmp_path)
    expected, _ = encoded(retriever, store)
    cut, altered, unrecorded, odd, *whole = shards_in(tmp_path)
    cut.write_bytes(cut.read_bytes()[:-4])
    data = bytearray(altered.read_bytes())
    data[-1] ^= 1
    altered.write_bytes(data)
    unrecorded.with_suffix(".json").unlink()  # killed between the two files
    odd.with_suffix(".json").write_text("{}")
    damaged = sum(len(encode(retriever, TEXTS, "passage").shards[i].numbers) for i in range(4))
    capfd.readouterr()
    vectors, read = encoded(retriever, store)
    assert (read, len(whole) > 1) == (damaged, True)
    np.testing.assert_array_equal(vectors, expected)
    size = cut.stat().st_size
    assert capfd.readouterr().err.splitlines() == [
        f"vectors: {cut}: damaged ({size - 4} bytes instead of {size}); encoded again",
        f"vectors: {altered}: damaged (its content differs from its digest); encoded again",
        f"vectors: {odd}: damaged (KeyError: 'bytes'); encoded again",
    ]
    assert encoded(retriever, store)[1] == 0


def test_nothing_of_other_weights_settings_or_texts_is_taken(retriever: Retriever, tmp_path: Path):
    encoded(retriever, store_of(retriever, tmp_path))
    for change in ({"passage_prefix": "w2 "}, {"eval_max_tokens": 5}, {"pooling": "eos"}, {"normalize": False}):
        other = tiny_retriever(**change)
        vectors, read = encoded(other, store_of(other, tmp_path))
        assert read == 40, change
        np.testing.assert_allclose(vectors, encoded(other, None)[0], rtol=0, atol=1e-5)
    assert encoded(retriever, store_of(retriever, tmp_path, dtype="fp16"))[1] == 40
    assert encoded(retriever, store_of(retriever, tmp_path), TEXTS | {"t0": "w1 w2 w3"})[1] == 40
    swapped = TEXTS | {"t0": TEXTS["t1"], "t1": TEXTS["t0"]}
    vectors, _ = encoded(retriever, store_of(retriever, tmp_path), swapped)
    np.testing.assert_allclose(vectors, encoded(retriever, None, swapped)[0], rtol=0, atol=1e-5)
    with torch.no_grad():
        next(retriever.encoder.parameters()).mul_(2)
    assert encoded(retriever, store_of(retriever, tmp_path))[1] == 40


@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_of_other_numbers_of_ranks_are_taken(world_size: int, retriever: Retriever, tmp_path: Path, monkeypatch):
    """One process leaves one shard to the ranks, so that all but one of them have nothing to do."""
    monkeypatch.setattr(embed, "SHARD_ROWS", 4)
    store, folder = store_of(retriever, tmp_path / "vectors"), tmp_path / "vectors"
    texts = {f"t{i}": text for i, text in enumerate(ragged_texts(23))}
    encoded(retriever, store, texts)
    before = {path: path.stat().st_mtime_ns for path in shards_in(folder)}
    gone = shards_in(folder)[3]
    gone.unlink()
    request = {"counts": [23, 23], "folder": str(folder)}  # the second time nothing is left to anybody
    answer = run_on_ranks("embed_ranks.py", world_size, request, tmp_path)
    assert len(answer["vectors"][0]) == world_size
    after = {path: path.stat().st_mtime_ns for path in before}
    assert [path for path in before if before[path] != after[path]] == [gone]
    assert encoded(retriever, store, texts)[1] == 0


def test_vectors_that_fp16_cannot_hold_are_an_error_with_their_ids(retriever: Retriever, tmp_path: Path):
    retriever.encoder.normalize = False
    with torch.no_grad():
        retriever.encoder.backbone.norm.weight.mul_(1e5)
    encode(retriever, {"a": "w5", "b": "w6"}, "passage", store_of(retriever, tmp_path))  # control
    with pytest.raises(ValueError, match=r"do not fit into fp16; keep them in fp32: a, b$"):
        encode(retriever, {"a": "w5", "b": "w6"}, "passage", store_of(retriever, tmp_path, dtype="fp16"))


def test_a_folder_that_is_kept_says_what_it_holds_of_others(retriever: Retriever, tmp_path: Path, capsys):
    store = store_of(retriever, tmp_path / "kept")
    encoded(retriever, store)
    leave(store, keep=True)
    assert capsys.readouterr().out == ""
    old = store.folder / "0123456789abcdef"
    old.mkdir()
    (old / "00000.npy").write_bytes(bytes(3 * 2**20))
    leave(store, keep=True)
    assert capsys.readouterr().out == (
        f"vectors: {store.folder}: 3 MiB are of 1 other checkpoints; delete what is not needed, "
        f"all but {store.checkpoint}\n"
    )
    assert json.loads(next(store.folder.rglob("encoding.json")).read_text())["texts"] == 41
    leave(Store(tmp_path / "never made", "0"), keep=True)  # nothing was encoded
    leave(store, keep=False)  # only what this evaluation encoded
    assert [path.name for path in store.folder.iterdir()] == [old.name]
    shutil.rmtree(old)
    encoded(retriever, store)
    leave(store, keep=False)
    assert not store.folder.exists()


def plain_shards() -> list[Shard]:
    rng = np.random.default_rng(0)
    return [
        Shard(part, rng.normal(size=(len(part), 3)).astype(np.float32))
        for part in np.split(rng.permutation(30), [4, 5, 20])
    ]


@pytest.mark.parametrize("rows", [1, 4, 7, 100])
def test_blocks_hold_the_rows_in_their_order(rows: int):
    shards = plain_shards()
    found = list(blocks(shards, rows, np.float64))
    assert all(block.dtype == np.float64 and block.flags.c_contiguous and len(block) <= rows for _, block in found)
    assert [before for before, _ in found] == np.cumsum([0, *(len(block) for _, block in found)])[:-1].tolist()
    np.testing.assert_array_equal(
        np.concatenate([block for _, block in found]), np.concatenate([s.vectors for s in shards])
    )


@pytest.mark.parametrize("most", [1, 2, 100])
def test_rows_are_taken_from_their_shards(most: int):
    shards = plain_shards()
    vectors = Vectors(shards, np.arange(30))
    wanted = np.array([29, 0, 7, 7, 19, 4])
    found = np.zeros((6, 3))
    for places, part in take_rows(shards, vectors.row[wanted], most):
        assert len(part) <= most
        found[places] = part
    np.testing.assert_array_equal(found, vectors.array()[wanted])
    for text in (0, 17):
        shard = next(shard for shard in shards if text in shard.numbers)
        np.testing.assert_array_equal(vectors.array()[text], shard.vectors[shard.numbers.tolist().index(text)])
