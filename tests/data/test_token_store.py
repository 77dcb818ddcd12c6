"""Rows of ids on disk."""

from pathlib import Path

import numpy as np
import pytest

from toolkit.data.token_store import TokenRows, TokenWriter, write_tokens

ROWS = [[1, 2, 3], [], [2**31 - 1, -(2**31)], [7] * 1000]


@pytest.mark.parametrize("rows", [ROWS, [], [[]]])
def test_rows_come_back(tmp_path: Path, rows: list[list[int]]):
    assert write_tokens(tmp_path, "text", iter(rows)) == len(rows)
    stored = TokenRows.open(tmp_path, "text")
    assert len(stored) == len(rows) and [stored[i].tolist() for i in range(len(rows))] == rows
    assert stored.ids.dtype == np.int32


def test_there_is_no_row_outside(tmp_path: Path):
    write_tokens(tmp_path, "text", ROWS)
    for row in (-1, len(ROWS)):
        with pytest.raises(IndexError):
            TokenRows.open(tmp_path, "text")[row]


def test_what_does_not_fit_is_refused(tmp_path: Path):
    with pytest.raises(OverflowError):
        write_tokens(tmp_path, "text", [[2**31]])


def test_two_writers_side_by_side(tmp_path: Path):
    with TokenWriter(tmp_path, "a") as a, TokenWriter(tmp_path, "b") as b:
        for i in range(100):
            a.append([i] * (i % 3))
            b.append([-i])
        assert (len(a), a.ids, b.ids) == (100, 99, 100)
    a, b = TokenRows.open(tmp_path, "a"), TokenRows.open(tmp_path, "b")
    assert all(a[i].tolist() == [i] * (i % 3) and b[i].tolist() == [-i] for i in range(100))


def test_an_unfinished_or_damaged_store_does_not_open(tmp_path: Path):
    def broken():
        yield [1]
        raise KeyError("broken row")

    with pytest.raises(KeyError):
        write_tokens(tmp_path, "text", broken())
    with pytest.raises(FileNotFoundError):
        TokenRows.open(tmp_path, "text")
    write_tokens(tmp_path, "text", ROWS)
    path = tmp_path / "text.ids"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"text\.ids: 4016 bytes, not 4020; delete the folder"):
        TokenRows.open(tmp_path, "text")
