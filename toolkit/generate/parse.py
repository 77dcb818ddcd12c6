"""What a model answered -> the texts that were asked for: a JSON object between whatever else, or one plain text.

Called by the tasks. Nothing here raises for an answer, however odd it is.
"""

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

_KEY = re.compile(r"(?:grade|passage)?[\s_-]*([0-9])", re.IGNORECASE)
_STRING_OR_COMMA = re.compile(r'("(?:[^"\\]|\\.)*+"|\\.)|,(?=\s*[}\]])', re.DOTALL)
_FENCE = re.compile(r"^```[\w-]*[ \t]*\n(.*?)\n?```\s*$", re.DOTALL)
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)|^.*</think>", re.DOTALL)
_QUOTES = (('"', '"'), ("\u201c", "\u201d"))
_MOST_BRACES = 1000
"""Opening braces of an answer that are tried; each costs the length of the answer, if nothing closes it."""
_DECODER = json.JSONDecoder(strict=False)  # line ends inside strings are let through


def graded_texts(text: str, grades: tuple[int, ...]) -> dict[int, str]:
    """Grade -> text of the JSON object in an answer that holds the most of these grades, the last of equal ones.

    The object may stand in prose, in code fences or in another object, and may have a comma too much before a bracket.
    Keys are grade_3, or "Grade 3", "3" and the like. An object that is cut off is none.
    """
    best: dict[int, str] = {}
    for found in _objects(_THOUGHT.sub("", text)):
        texts: dict[int, str] = {}
        for key, value in found.items():
            match = _KEY.fullmatch(key.strip())
            if match and int(match[1]) in grades and isinstance(value, str):
                texts[int(match[1])] = value.strip()
        if len(texts) >= len(best):
            best = texts
    return best


def plain_text(text: str) -> str:
    """The text of an answer that is a text alone, without thoughts before it, code fences and quotes around it."""
    text = _THOUGHT.sub("", text).strip()
    if fenced := _FENCE.match(text):
        text = fenced[1].strip()
    for first, last in _QUOTES:
        inside = text[1:-1]
        if len(text) > 1 and text[0] == first and text[-1] == last and first not in inside and last not in inside:
            text = inside.strip()
    return text


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Every JSON object that can be read from the text, those inside others too, as it is or without odd commas."""
    for version in (text, _STRING_OR_COMMA.sub(lambda match: match[1] or "", text)):
        some = False
        for brace in islice(re.finditer(r"\{", version), _MOST_BRACES):
            try:
                value, _ = _DECODER.raw_decode(version, brace.start())
            except (ValueError, RecursionError):
                continue
            some = True
            yield value
        if some:
            return
