"""Templates of prompts: a TOML file of texts with $placeholders, checked when it is read, filled later.

Called by the prompts of each kind of generation.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from toolkit.data.faults import listed
from toolkit.recipe.errors import RecipeError, did_you_mean, one_line

SHIPPED = Path(__file__).parent / "templates"
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n){2,}")


class Text(NamedTuple):
    """What a text of a template may hold."""

    placeholders: frozenset[str]
    may_be_missing: bool = False


def read_template(path: Path) -> dict[str, Any]:
    """The tables of a template.

    Raises:
        RecipeError: for a file that cannot be read or is no TOML, with the line.
    """
    at = one_line(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RecipeError(f"{at}: cannot be read ({error.strerror}); name a template for --template") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{at}: is not UTF-8 text; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{at}: is no TOML ({one_line(error, 120)}); mend it there") from None


def texts_of(found: Mapping[str, Any], at: str, known: Mapping[str, Text], required: Iterable[str]) -> dict[str, str]:
    """The texts of one table of a template.

    Args:
        at: names the file and the table, for errors.
        known: name -> what it may hold.
        required: placeholders that must stand in one of the texts.

    Raises:
        RecipeError: for a text that is missing, unknown or no text, and for a placeholder that is missing or unknown.
    """
    for name in found:
        if name not in known:
            raise RecipeError(f"{at}: unknown text {one_line(repr(name), 60)}; {did_you_mean(name, list(known))[0]}")
    there: set[str] = set()
    for name, rules in known.items():
        if name not in found and not rules.may_be_missing:
            raise RecipeError(f"{at}: {name} is missing; write {name} = '''...'''")
        if name in found:
            there |= _placeholders(found[name], f"{at}: {name}", rules.placeholders)
    for name in required:
        if name not in there:
            raise RecipeError(f"{at}: no text holds ${name}; write it where it is to be filled in")
    return {name: found[name].strip() for name in known if name in found}


def _placeholders(text: Any, at: str, known: frozenset[str]) -> set[str]:
    check_text(text, at)
    template = Template(text)
    if not template.is_valid():
        raise RecipeError(f"{at}: a $ begins no placeholder; write $$ for a dollar sign")
    names = set(template.get_identifiers())
    for name in sorted(names - known):
        fix = did_you_mean(name, sorted(known))[0] if known else "none can stand here"
        raise RecipeError(f"{at}: unknown placeholder ${one_line(name, 40)}; {fix}, or $$ for a dollar sign")
    return names


def check_text(text: Any, at: str) -> None:
    """RecipeError for a value of a template that is no text."""
    if not isinstance(text, str):
        raise RecipeError(f"{at}: is no text; write it between quotes")


def choices_of(found: Any, at: str) -> dict[str, dict[str, str]]:
    """The attributes of a template: attribute -> name -> text.

    Raises:
        RecipeError: for what is no such table.
    """
    if not isinstance(found, dict):
        raise RecipeError(f'{at}: is no table; write [attributes.length] and below it "none" = ""')
    for attribute, choices in found.items():
        if not isinstance(choices, dict) or not choices:
            raise RecipeError(f'{at}.{one_line(attribute, 60)}: is no table of texts; write "name" = "text" below it')
        for name, text in choices.items():
            check_text(text, f"{at}.{one_line(attribute, 60)}.{one_line(name, 60)}")
    return {attribute: dict(choices) for attribute, choices in found.items()}


def check_tables(found: Mapping[str, Any], at: str, known: list[str]) -> None:
    """RecipeError for a table of a template that nothing reads, or one that is missing."""
    for name in found:
        if name not in known:
            raise RecipeError(
                f"{at}: unknown table {one_line(repr(name), 60)}; those of a template are {listed(known)}"
            )


def holds(text: str, placeholder: str) -> bool:
    """Whether a text has this placeholder."""
    return placeholder in Template(text).get_identifiers()


def fill(text: str, values: Mapping[str, str]) -> str:
    """A text with its placeholders filled in; what is filled in is not looked at again. No two blank lines follow."""
    return _BLANK_LINES.sub("\n\n", Template(text).substitute(values)).strip()


def template_hash(parts: Any) -> str:
    """16 hex digits of the texts of a template that are used."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
