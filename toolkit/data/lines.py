"""Lines of text files, plain or gzipped, and what they hold; a fault is one line. Called by the readers of rows."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit.data.faults import RowFault
from toolkit.recipe.errors import RecipeError, one_line


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number from 1 and bytes of each line that is not blank; a byte order mark before the first is no part of it.

    Holds one line at a time, however long.

    Raises:
        RecipeError: for a file that cannot be read, or not to its end.
    """
    number, at = 0, one_line(path)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RecipeError(f"{at}: line {number + 1}: damaged gzip file ({error}); copy it again") from None
    except OSError as error:
        raise RecipeError(f"{at}: cannot be read ({error.strerror or error}); mend the file or its rights") from None


def decoded(line: bytes, where: str) -> str:
    """The text of a line; RowFault if it is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        line_of = f"{where}: byte {error.start + 1} is not UTF-8; convert the file to UTF-8"
        raise RowFault("not UTF-8", line_of) from None


def parsed(line: bytes, where: str) -> Any:
    """The JSON value of a line; RowFault if it holds none."""
    text = decoded(line, where).rstrip("\r\n")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
    except RecursionError:
        problem = "not JSON of use (nested too deep)"
    except ValueError:
        problem = "not JSON of use (a number too long)"
    raise RowFault("not JSON", f"{where}: {problem}; write one object a line")
