"""The journal: cut anywhere it is one of fewer items; damage, other runs, full disks, second commands are told."""

import errno
import fcntl
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.generate import written
from toolkit.generate.written import Part, begun_with, check_same, finished, held, mend, records, write_run
from toolkit.recipe.errors import RecipeError

ITEMS: list[dict[str, Any]] = [
    {"id": "a", "kept": True, "text": "plain"},
    {"id": "b\n", "kept": False, "text": "naïve 東京 🙂 \u2028 }"},
    {"id": "c", "kept": True, "text": "x" * 50},
    {"id": "d", "kept": True, "text": ""},
]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    with held(tmp_path / "out"):
        return tmp_path / "out"


def write(output: Path, items: list[dict[str, Any]], number: int = 0) -> Path:
    part = Part(output, number)
    for item in items:
        part.append(item)
    part.close()
    return output / ".journal" / f"part_{number:05d}.jsonl"


def read(output: Path) -> list[dict[str, Any]]:
    return list(records(finished(output).values()))


def test_a_journal_that_is_cut_at_any_byte_is_gone_on_with(output: Path):
    path = write(output, ITEMS)
    whole = path.read_bytes()
    ends = [0]
    for line in whole.splitlines(keepends=True):
        ends.append(ends[-1] + len(line))
    assert len(ends) == len(ITEMS) + 1  # no line end stands inside a line
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        mend(output)
        left = sum(end <= size for end in ends) - 1
        assert read(output) == ITEMS[:left] and path.stat().st_size == ends[left]
        write(output, ITEMS[left:])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("tail", [b"\0" * 30, b"\0" * 30 + b"\n", b'{"id": "e", "kept": tr\n', b"\xff\xfe\n", b"[]\n"])
def test_a_last_line_whose_blocks_were_lost_is_cut_off(tail: bytes, output: Path):
    path = write(output, ITEMS)
    with path.open("ab") as file:
        file.write(tail)
    mend(output)
    assert read(output) == ITEMS


@pytest.mark.parametrize(
    ("line", "problem"),
    [(b"garbage\n", "line 2 is damaged; delete"), (b'{"id": "a", "kept": true}\n', "line 2 holds 'a' a second time")],
)
def test_damage_before_the_last_line_is_told_with_its_line(line: bytes, problem: str, output: Path):
    path = write(output, ITEMS)
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, line, *others]))
    mend(output)
    with pytest.raises(RecipeError, match=problem):
        finished(output)


def test_items_are_read_from_all_parts_in_any_order(output: Path):
    write(output, ITEMS[:2], 0)
    write(output, ITEMS[2:], 3)
    places = finished(output)
    assert [place.kept for place in places.values()] == [True, False, True, True]
    order = ["d", "a", "c", "b\n"]
    assert [record["id"] for record in records(places[name] for name in order)] == order


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(), max_size=6), st.binary(max_size=20))
def test_any_text_comes_back_and_any_torn_end_goes(texts: list[str], torn: bytes):
    with tempfile.TemporaryDirectory() as folder, held(Path(folder) / "out"):
        output = Path(folder) / "out"
        items = [
            {"id": str(number), "kept": True, "text": text.encode("utf-8", "ignore").decode()}
            for number, text in enumerate(texts)
        ]
        path = write(output, items)
        with path.open("ab") as file:
            file.write(torn.replace(b"\n", b""))
        mend(output)
        assert read(output) == items


def test_a_second_process_is_refused(output: Path):
    with held(output), (output / ".journal" / ".lock").open() as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(
            RecipeError, match=rf"is in use by process {os.getpid()} on .*; wait for its end, or end it"
        ):
            held(output).__enter__()
    with held(output):
        pass


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(RecipeError, match="is there already, without what a generation goes on from"), held(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    with (
        pytest.raises(RecipeError, match=r"file.txt: cannot be written \(Not a directory\)"),
        held(tmp_path / "file.txt"),
    ):
        pass


def test_what_differs_is_named(output: Path):
    write_run(output, {"begun_with": {"seed": 1, "form": "together"}})
    found = begun_with(output)
    assert found is not None
    check_same(output, found["begun_with"], {"seed": 1, "form": "together"})
    with pytest.raises(
        RecipeError, match="was begun with seed 1, now 2, form together, now one-by-one; go on with what"
    ):
        check_same(output, found["begun_with"], {"seed": 2, "form": "one-by-one"})
    for damaged in ("{", "[]", "{}"):
        (output / ".journal" / "run.json").write_text(damaged)
        with pytest.raises(RecipeError, match=r"run.json: is damaged"):
            begun_with(output)
    (output / ".journal" / "run.json").unlink()
    assert begun_with(output) is None
    write(output, ITEMS)  # what was begun cannot be told any more, so nothing may be added to it
    with pytest.raises(RecipeError, match=r"run.json: is gone, though something is finished; put it back, or choose"):
        begun_with(output)


def test_a_full_disk_is_one_line_and_the_journal_stays_whole(output: Path, monkeypatch):
    path = write(output, ITEMS[:2])
    part, real = Part(output, 0), os.write

    def full(file: int, data: bytes) -> int:
        real(file, data[:7])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(written.os, "write", full)
    with pytest.raises(
        RecipeError, match=r"part_00000.jsonl: cannot be written \(No space left on device\); what is f"
    ):
        part.append(ITEMS[2])
    monkeypatch.undo()
    part.close()
    assert path.read_bytes().endswith(json.dumps(ITEMS[2]).encode()[:7])
    mend(output)
    assert read(output) == ITEMS[:2]
