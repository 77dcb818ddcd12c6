"""Whatever a file of graded rows or of judgements holds, its reader gives rows of use or one line."""

import gzip
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from garbage import BROKEN, PIECES, TEXT, VALUES, damaged, examples, line, outcome, rows
from hypothesis import given
from hypothesis import strategies as st

from toolkit.data.faults import Skipped
from toolkit.data.graded_records import GradedRow, read_graded
from toolkit.data.judged import Judged, read_judged
from toolkit.recipe.graded import FolderGraded, GradedSource

GRADES = st.one_of(st.integers(-1, 4), st.floats(), VALUES)
PASSAGE = st.fixed_dictionaries(
    {"text": st.one_of(st.sampled_from(["p", "r", ""]), VALUES), "grade": GRADES},
    optional={"title": st.one_of(TEXT, st.none()), "id": VALUES},
)
ROWS = rows(["query", "passages", "query_id"], passages=st.lists(PASSAGE, max_size=3), query_id=st.integers(0, 2))
LINES = st.one_of(BROKEN, st.binary(max_size=12), VALUES.map(line))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("garbage")


def source(path: Path, **keys: Any) -> FolderGraded:
    return FolderGraded.model_validate({"folder": str(path)} | keys)


def is_of_use(row: GradedRow) -> bool:
    texts = [row.query, *(passage.text for passage in row.passages)]
    fit = all(text.strip() and text.encode() for text in texts)
    return fit and all(math.isfinite(passage.grade) for passage in row.passages)


def check(given_source: GradedSource, counted: bool = True) -> None:
    """Both modes give rows of use or one line, and skipping adds nothing where nothing is refused."""
    skipped, counts = Skipped(), Counter[str]()
    refusing = outcome(lambda: list(read_graded(given_source, Counter())))
    skipping = outcome(lambda: list(read_graded(given_source, counts, skipped)))
    for found in (refusing, skipping):
        assert "\n" not in found if isinstance(found, str) else all(map(is_of_use, found))
    if not isinstance(refusing, str):
        assert skipping == refusing and not skipped.kinds
    if counted and not isinstance(skipping, str):
        assert counts["rows"] == len(skipping) + counts["empty"] + skipped.kinds.total()


def test_any_lines(place: Path):
    @examples(120)
    @given(st.lists(st.one_of(ROWS.map(line), LINES), max_size=5), st.sampled_from([".jsonl", ".jsonl.gz"]))
    def any_lines(lines: list[bytes], suffix: str) -> None:
        path = place / f"x{suffix}"
        data = b"\n".join(lines)
        path.write_bytes(gzip.compress(data, 1) if suffix.endswith(".gz") else data)
        check(source(path))

    any_lines()


IDS = st.one_of(st.sampled_from(["q0", "q1", "d0", "d1", 2]), VALUES)
LISTS = rows(["qid", "docid", "score"], qid=IDS, docid=st.lists(IDS, max_size=2), score=st.lists(GRADES, max_size=2))
FIELDS = st.one_of(st.sampled_from(["q0", "q1", "d0", "d1", "1", "-1.5", "nan", "1e999", "²"]), TEXT.map(repr))
WHOLE = {
    "a.jsonl": b'{"qid": "q0", "docid": ["d0", "d1"], "score": [1, 0.5]}\n{"qid": "q1", "docid": ["d1"], "score": [2]}',
    "a.run": b"q0 Q0 d0 1 9.5 r\nq0 Q0 d1 2 9 r\nq1 Q0 d1 1 3 r\n",
    "a.txt": b"q0 0 d0 1\nq1 0 d1 0\n",
    "a.tsv": b"query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t2\n",
}
OWN = st.one_of(LISTS.map(line), st.lists(FIELDS, max_size=7).map(lambda fields: " ".join(fields).encode()), PIECES)


@pytest.mark.parametrize("name", WHOLE)
def test_any_judgements(place: Path, name: str):
    folder = place / name.replace(".", "_")
    folder.mkdir()
    texts = {"corpus": ("d0", "d1"), "queries": ("q0", "q1")}
    for part, ids in texts.items():
        (folder / f"{part}.jsonl").write_text("".join(json.dumps({"_id": i, "text": f"t{i}"}) + "\n" for i in ids))
    path = place / name

    @examples(120)
    @given(
        st.one_of(
            damaged(WHOLE[name]), st.lists(OWN | LINES, max_size=4).map(lambda lines: b"\n".join([WHOLE[name], *lines]))
        )
    )
    def any_judgements(data: bytes) -> None:
        path.write_bytes(data)
        for found in (outcome(lambda: list(read_judged(path))), outcome(lambda: list(read_judged(path, Skipped())))):
            for each in () if isinstance(found, str) else found:
                assert (
                    isinstance(each, Judged) and len(set(each.passages)) == len(each.passages) == len(each.grades) > 0
                )
                assert all(map(math.isfinite, each.grades)) and each.query.encode()
        for grade in (None, 1.0):
            check(source(folder, format="beir", judgements=str(path), grade=grade), counted=False)

    any_judgements()
