"""Whatever an evaluation folder holds, it is a collection with every row of it, or one line; nothing is left out."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from beir import write_beir, write_hub_layout, write_questions
from garbage import BROKEN, VALUES, damaged, examples, line, outcome, rows
from hypothesis import given
from hypothesis import strategies as st

from eval.scores import per_query_scores
from eval.suites import load_suite
from eval.tasks import MtebTask, Task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beir(tmp_path_factory.mktemp("garbage") / "small", num_documents=45, num_queries=7)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("garbage") / "questions"
    return write_questions(place, [("T", "a b"), ("", "c")], [("what", ["a"]), ("who", ["c", "d"])])


def load(suite: str | Path) -> list[Task | MtebTask] | str:
    return outcome(lambda: list(load_suite(str(suite))))


def check(suite: Path) -> None:
    found = load(suite)
    if isinstance(found, str):
        return
    (task,) = found
    assert isinstance(task, Task)
    _, documents, queries, qrels = task.collection
    for names in (documents, queries):
        assert all((name + text).encode() and "\0" not in name for name, text in names.items())
    run = {query: dict.fromkeys(list(documents)[:3], 1.0) for query in queries}
    if task.answers is None:
        per_query_scores(run, qrels)


OWN = rows(["_id", "text", "title", "answers"], _id=st.sampled_from(["d0", "q5", "n", 3]), answers=st.just(["a"]))
LINES = st.one_of(BROKEN, VALUES.map(line), OWN.map(line), st.sampled_from([b"q5\td0\t2147483648", b"q5\td\0\t1"]))


def files_of(place: Path, part: str) -> tuple[bytes, st.SearchStrategy[bytes]]:
    """What a file of a folder holds, and garbage in its place."""
    whole = (place / part).read_bytes()
    grown = st.lists(LINES, min_size=1, max_size=3).map(lambda lines: whole.rstrip() + b"\n" + b"\n".join(lines))
    return whole, st.one_of(damaged(whole), grown)


@pytest.mark.parametrize("part", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_any_file_of_a_beir_folder(folder: Path, part: str):
    whole, garbage = files_of(folder, part)

    @examples(60)
    @given(garbage)
    def any_file(data: bytes) -> None:
        (folder / part).write_bytes(data)
        check(folder)

    any_file()
    (folder / part).write_bytes(whole)
    assert not isinstance(load(folder), str)


@pytest.mark.parametrize("part", ["corpus.jsonl", "queries.jsonl"])
def test_any_file_of_questions(questions: Path, part: str):
    whole, garbage = files_of(questions, part)

    @examples(50)
    @given(garbage)
    def any_file(data: bytes) -> None:
        (questions / part).write_bytes(data)
        check(questions)

    any_file()
    (questions / part).write_bytes(whole)
    assert not isinstance(load(questions), str)


@examples(50)
@given(
    st.one_of(
        st.text(max_size=20), st.sampled_from(["~nobody/x", "x" * 5000, "quick:" + "x" * 5000, "SciFact=~nobody"])
    )
)
def test_any_name_of_a_folder(name: str):
    found = load(f"./{name}" if "=" not in name else name)
    assert isinstance(found, str) or name.strip("./ ") == ""


ONE = "write query-id, corpus-id and a whole number (at most six digits) between tabs"
FAULTS: list[tuple[str, bytes, str]] = [
    ("corpus.jsonl", b'{"_id": "d0", "text": "again"}', "_id 'd0' stands in an earlier line too; ids must differ"),
    ("corpus.jsonl", b'{"_id": "a\\u0000", "text": "x"}', "_id 'a\\x00' holds a tab, a line end or NUL; rename it"),
    ("corpus.jsonl", b'{"_id": "\\ud800", "text": "x"}', "'_id' holds half a surrogate pair"),
    ("corpus.jsonl", b'{"_id": NaN, "text": "x"}', "_id holds the number nan; write a string"),
    ("corpus.jsonl", b'{"_id": null, "text": "x"}', "_id holds null; write a string"),
    ("corpus.jsonl", b'{"_id": "n", "text": "\xe9"}', "is not UTF-8; convert the file to UTF-8"),
    ("queries.jsonl", b"[" * 5000, "not JSON of use (nested too deep)"),
    ("queries.jsonl", b"null", 'write {"_id": ..., "text": "..."}'),
    ("qrels/test.tsv", b"q5\td5\t0", "query 'q5' and document 'd5' have grade 2 in an earlier line; keep one"),
    ("qrels/test.tsv", b"q5\td1\t2147483648", ONE),  # trec_eval would take all memory
    ("qrels/test.tsv", b"q5\td1\t0.5", ONE),
    ("qrels/test.tsv", b"q5\td\xff\t1", "is not UTF-8; convert the file to UTF-8"),
]


@pytest.mark.parametrize(("part", "added", "problem"), FAULTS)
def test_a_fault_is_refused_with_its_line(folder: Path, part: str, added: bytes, problem: str):
    whole = (folder / part).read_bytes()
    (folder / part).write_bytes(whole + added)
    try:
        found = load(folder)
    finally:
        (folder / part).write_bytes(whole)
    number = whole.count(b"\n") + 1
    assert isinstance(found, str) and found.startswith(f"{folder / part}: line {number}: ") and problem in found


def test_a_mark_and_windows_line_ends_are_no_fault(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "small")
    for part in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        path = tmp_path / "small" / part
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    with (tmp_path / "small" / "qrels" / "test.tsv").open("a") as file:
        file.write("q5\td5\t2\r\n")  # the same judgement once more
    (whole,), (windows,) = load(folder), load(tmp_path / "small")
    assert windows.revision == whole.revision  # a digest of all texts and judgements


HUB_FAULTS: list[tuple[str, bytes, str]] = [
    ("README.md", b"---\nconfigs:\n\t- [\xff\n---\n", "cannot be loaded"),
    (
        "corpus.jsonl",
        b'{"_id": "d0", "title": "", "text": "again"}',
        "corpus: row with _id 'd0': an earlier row has this _id too",
    ),
    (
        "corpus.jsonl",
        b'{"_id": "n", "title": "", "text": null}',
        "corpus: row with _id 'n': write _id and text as strings",
    ),
    ("corpus.jsonl", b'{"_id": "n", "title": "", "text": "\xff"}', "cannot be loaded"),
    ("queries.jsonl", b'{"_id": "q5", "text": null}', "queries: row with _id 'q5': write _id and text as strings"),
    (
        "judgements_test.jsonl",
        b'{"query-id": "q5", "corpus-id": "d1", "score": null}',
        "judgement (q5, d1, None): write",
    ),
    ("judgements_test.jsonl", b'{"query-id": "q5", "corpus-id": "d1", "score": 2147483647}', "d1, 2147483647): write"),
]


def test_faults_in_the_hubs_layout_are_one_line(folder: Path, tmp_path: Path):
    """Where the library would give null for a text, the last of equal ids, or a traceback."""
    good = write_hub_layout(tmp_path / "good", folder)
    assert not isinstance(load(good), str) and not isinstance(load(f"SciFact={good}"), str)
    for number, (part, added, problem) in enumerate(HUB_FAULTS):
        bad = tmp_path / str(number)
        shutil.copytree(good, bad)
        whole = (bad / part).read_bytes()
        (bad / part).write_bytes(added if part == "README.md" else whole + added + b"\n")
        found: Any = load(bad)
        assert isinstance(found, str) and problem in found
    assert load(f"SciFact={tmp_path / '1'}") == f"{tmp_path}/1: {HUB_FAULTS[1][2]}; ids must differ"
    (good / "corpus.jsonl").write_bytes(b'{"text": "no id"}\n')
    assert load(good) == f"{good}: corpus lacks id; give each row _id and text"
