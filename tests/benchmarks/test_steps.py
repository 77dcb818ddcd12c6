"""The texts that the benchmarks of a step run on."""

import pytest
import steps

from toolkit.data.records import Collection

DOCSTRINGS = {f"docstring {i}": f"described {i}" for i in range(20)}
NAMED = [*((f"name {i}", f"named {i}") for i in range(30)), ("name 3", "another"), ("alias", "named 7")]


@pytest.fixture(autouse=True)
def small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    collection = Collection(
        name="small",
        documents={f"d{i}": code for i, code in enumerate(DOCSTRINGS.values())},
        queries={f"q{i}": text for i, text in enumerate(DOCSTRINGS)},
        qrels={f"q{i}": {f"d{i}": 1} for i in range(len(DOCSTRINGS))},
    )
    monkeypatch.setattr(steps, "collection", {"train": collection}.__getitem__)
    monkeypatch.setattr(steps, "named_code", lambda: iter(NAMED))


def test_named_code_follows_when_the_docstrings_run_out() -> None:
    queries, documents = steps.texts_of(50)
    pairs = list(zip(queries, documents, strict=True))
    assert set(pairs[:20]) == set(DOCSTRINGS.items())
    assert set(pairs[20:]) < set(NAMED) and len(set(queries)) == len(set(documents)) == 50
    assert pairs[:20] != list(DOCSTRINGS.items())  # in random order, so that a batch is of all modules
    for rows in (1, 7, 20, 21, 49):  # a smaller batch is the beginning of a larger one
        assert steps.texts_of(rows) == (queries[:rows], documents[:rows])
    with pytest.raises(ValueError, match="has 50 pairs; found a batch of 51"):
        steps.texts_of(51)
