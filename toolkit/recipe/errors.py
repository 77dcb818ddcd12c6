"""Reading a recipe file and saying what is wrong with it: JSON, overrides, and pydantic's errors as path, problem, fix.

Called by the schema; everyone who finds a mistake of the user raises RecipeError.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo

_SOURCES = "data.sources: "


class RecipeError(Exception):
    """A mistake the user can mend: one line per problem, each with its path and its fix."""


@contextmanager
def of_flag(flag: str) -> Iterator[None]:
    """What is said of `data.sources`, the key of a recipe, is said of a command's flag, as "--queries"."""
    try:
        yield
    except RecipeError as error:
        if str(error).startswith(_SOURCES):
            raise RecipeError(f"{flag}: {str(error).removeprefix(_SOURCES)}") from None
        raise


def one_line(text: object, longest: int | None = None) -> str:
    """A text on one line that every terminal and file takes: escapes for line ends, controls and lone surrogates.

    Args:
        longest: characters that are kept, the last three of a longer text as "..."; None: all.
    """
    text = str(text)
    if longest is not None and len(text) > longest:
        text = text[: longest - 3] + "..."
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file; RecipeError for anything else, a key written twice included."""
    at = one_line(path)

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        times = Counter(name for name, _ in pairs)
        twice = sorted(one_line(repr(name), 60) for name, count in times.items() if count > 1)
        if twice:
            raise RecipeError("\n".join(f"{at}: key {key} is written twice in one section; keep one" for key in twice))
        return dict(pairs)

    try:
        text = path.read_text(encoding="utf-8-sig")
        raw = json.loads(text, object_pairs_hook=refuse_duplicates, parse_int=_whole)
    except OSError as error:
        raise RecipeError(f"{at}: cannot be read ({error.strerror}); give the path of a recipe") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{at}: is not UTF-8 text; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"{at}: line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); mend it there"
        ) from None
    except RecursionError:
        raise RecipeError(f"{at}: sections are nested too deeply for a recipe; flatten them") from None
    except ValueError as error:  # an integer that is too large
        raise RecipeError(f"{at}: a value cannot be read ({error}); write a smaller one") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{at}: a recipe is a JSON object; found {_shown(raw)}; write {{...}}")
    return raw


def _whole(digits: str) -> int:
    """A whole number of a recipe; ValueError for one that is larger than the libraries' seeds and counts may be."""
    if len(digits) > 17 or abs(int(digits)) > 2**53:
        raise ValueError(f"{one_line(digits, 40)} is beyond 2^53")
    return int(digits)


def override(raw: dict[str, Any], assignments: tuple[str, ...]) -> None:
    """Set each `key.path=value` in `raw`; the value is JSON, or a plain string when it is not valid JSON."""
    problems = [problem for text in assignments if (problem := _set(raw, text))]
    if problems:
        raise RecipeError("\n".join(problems))


def _set(raw: dict[str, Any], text: str) -> str | None:
    """Apply one assignment; returns what is wrong with it."""
    key, equals, value = text.partition("=")
    told = f"--set {one_line(text, 120)}"
    if not equals or not key:
        return f"{told}: not an assignment; write --set key.path=value"
    try:
        parsed = json.loads(value, parse_int=_whole)
    except RecursionError:
        return f"{told}: the value is nested too deeply for a recipe; flatten it"
    except ValueError:
        parsed = value
    node: Any = raw
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        if isinstance(node, list) and (place := _place_in(node, part)) is not None:
            node = node[place]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            missing = one_line(".".join(parents[: depth + 1]), 120)
            return f"{told}: {missing} is not in the recipe; name a section that is"
    parent = one_line(".".join(parents))
    if isinstance(node, dict):
        node[last] = parsed
    elif isinstance(node, list) and (place := _place_in(node, last)) is not None:
        node[place] = parsed
    elif isinstance(node, list):
        return f"{told}: {parent} has entries 0 to {len(node) - 1}; name one of them"
    else:
        return f"{told}: {parent} is {_shown(node)}, not a section; set it as a whole"
    return None


def _place_in(entries: list[Any], part: str) -> int | None:
    """The entry that a part of a key names; None if it names none."""
    named = part.isdecimal() and len(part) < 10 and int(part) < len(entries)
    return int(part) if named else None


Owners = Callable[[type[BaseModel], str], list[str]]  # a section and a key it has not -> the methods that have it


def explain(root: type[BaseModel], invalid: ValidationError, owners_of: Owners) -> list[str]:
    """Every problem pydantic found, as `path: problem; fix`; a key missing because it is misspelt is said once."""
    found = [_explain(root, error, owners_of) for error in invalid.errors(include_url=False)]
    misspelt = {meant for _, _, meant in found if meant}
    return [
        f"{path}: {problem}" for path, problem, _ in found if not (problem.startswith("missing") and path in misspelt)
    ]


def _explain(root: type[BaseModel], error: Any, owners_of: Owners) -> tuple[str, str, str | None]:
    """(path, problem and fix, path of the key that was meant)."""
    path, sections = _place(root, error["loc"])
    parent, _, last = path.rpartition(".")
    match error["type"]:
        case "extra_forbidden":
            known = sorted({name for section in sections for name in _fields(section)})
            hint, meant = did_you_mean(last, known)
            elsewhere = [name for section in sections for name in owners_of(section, last)]
            if elsewhere:
                hint = f"{' and '.join(elsewhere)} have it: remove it, or change objective.name; {_known(known)}"
                hint = hint if len(elsewhere) > 1 else hint.replace(" have it", " has it")
                return path, f"unknown key; {hint}", None
            return path, f"unknown key; {hint}", f"{parent}.{meant}".lstrip(".") if meant else None
        case "missing":
            what = {_fields(section)[last].description for section in sections if last in _fields(section)}
            about = "".join(f": {text[0].lower()}{text[1:].rstrip('.')}" for text in what if text)
            return path, f"missing; add this key{about}", None
        case "union_tag_invalid":
            hint, _ = did_you_mean(str(error["ctx"]["tag"]), re.findall(r"'(\w+)'", error["ctx"]["expected_tags"]))
            tag = one_line(repr(error["ctx"]["tag"]), 60)
            return f"{path}.{_discriminator(error)}", f"{tag} is unknown; {hint}", None
        case "no_method":
            return path, error["msg"], None
        case "union_tag_not_found" if "()" in error["ctx"]["discriminator"]:  # by a function: a stage
            return path, f"must be a section; write {{...}} in place of {_shown(error['input'])}", None
        case "union_tag_not_found":
            return f"{path}.{_discriminator(error)}", "missing; add this key", None
        case "string_pattern_mismatch":
            return path, f"{_shown(error['input'])} is no name; use letters, digits, '_', '-' and '.'", None
        case "model_type" | "model_attributes_type" | "dict_type":
            return path, f"must be a section; write {{...}} in place of {_shown(error['input'])}", None
        case _:
            return path, f"{error['msg'][0].lower()}{error['msg'][1:]}; found {_shown(error['input'])}", None


def _discriminator(error: Any) -> str:
    """The key whose value says which section of a union is meant."""
    return error["ctx"]["discriminator"].strip("'")


def _place(root: type[BaseModel], location: tuple[str | int, ...]) -> tuple[str, set[type[BaseModel]]]:
    """The path of an error as the file writes it (pydantic adds the tags of unions), and the section that holds it."""
    path: list[str] = []
    owners, inside, tags = {root}, {root}, {}
    for part in location:
        if isinstance(part, int):
            path.append(str(part))
        elif tags:
            inside, tags = {tags[part]} if part in tags else set(), {}
        else:
            path.append(one_line(part, 60))
            owners = inside
            fields = [_fields(owner)[part] for owner in owners if part in _fields(owner)]
            arms = [arm for field in fields for arm in _sections(field.annotation)]
            alone = len(arms) == 1 and arms[0][0] == _literal(arms[0][1])  # no union: nothing chooses by the literal
            inside = {section for _, section in arms}
            tags = {} if alone else {tag: section for tag, section in arms if tag}
    return ".".join(path), owners


def _fields(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The keys of a section as the file writes them."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _sections(annotation: Any, tag: str | None = None) -> Iterator[tuple[str | None, type[BaseModel]]]:
    """Every section that can stand at an annotation (through lists, options and unions), with its tag in the union."""
    if isinstance(annotation, type) and not get_args(annotation):
        if issubclass(annotation, BaseModel):
            yield _literal(annotation) or tag, annotation
        return
    for part in get_args(annotation):
        own = next((meta.tag for meta in getattr(annotation, "__metadata__", ()) if isinstance(meta, Tag)), None)
        yield from _sections(part, own or tag)


def _literal(section: type[BaseModel]) -> str | None:
    """The value by which a union knows a section: that of its key `name`, `by` or `rule`, if only one is possible."""
    keys = [section.model_fields[key].annotation for key in ("name", "by", "rule") if key in section.model_fields]
    fixed = [get_args(value)[0] for value in keys if get_origin(value) is Literal]
    return fixed[0] if fixed else None


def did_you_mean(word: str, known: list[str]) -> tuple[str, str | None]:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (f"did you mean {close[0]}?", close[0]) if close else (_known(known), None)


def _known(words: list[str]) -> str:
    return f"known: {', '.join(words)}"


def _shown(value: Any) -> str:
    try:
        return one_line(json.dumps(value, default=str, ensure_ascii=False), 40)
    except RecursionError:
        return "sections in sections"
