"""Which texts of a model are let through: long enough, about their matter, nobody's copy; a refusal has a cause.

Called by the tasks, for texts of any kind, and for passages of several grades.
"""

import functools
import re
from collections.abc import Iterable

import regex

from toolkit.retrieval.words import NGRAMS, words_of

FEWEST_WORDS = 10
MOST_ALIKE = 0.8  # share of the words of two texts that both have (Jaccard)
COPIED_WORDS = (6, 12)  # a query of so many words is copied by its whole, or by so many of its words in a row

# Causes, each with what the report says of it.
CUT = "cut off"
MISSING = "grade missing"
REFUSED = "no answer"
BROKEN = "broken characters"
SHORT = "too short"
META = "speaks of the task"
COPY = "copy of the query"
EXAMPLE = "copy of the example"
ALIKE = "near-duplicates"
CAUSES = {
    REFUSED: "the engine refused the request, for example because it is too long",
    CUT: "the answer ended at the largest number of tokens before it was whole",
    MISSING: "the answer has no text for some grade",
    BROKEN: "a passage holds half characters, control characters or U+FFFD",
    SHORT: f"a passage has fewer than {FEWEST_WORDS} words",
    META: "a passage speaks of a query, of relevance, of its grade or of itself",
    COPY: "a passage repeats the query",
    EXAMPLE: f"a passage shares more than {MOST_ALIKE:.0%} of its words with one of the worked example",
    ALIKE: f"two passages share more than {MOST_ALIKE:.0%} of their words",
}

_BROKEN = regex.compile(r"[\p{Cs}\uFFFD]|[^\P{Cc}\t\n\r]")
# What only a text about its own task says, each with the words that excuse it where the query itself has them.
_META = [
    (re.compile(meta, re.IGNORECASE), re.compile(excuse, re.IGNORECASE))
    for meta, excuse in (
        (r"\bquer(?:y|ies)\b", r"\bquer(?:y|ies)|\bsql\b|database"),
        (r"\b(?:ir)?relevance\b", r"\b(?:ir)?relevan"),
        (r"\b(?:ir)?relevant (?:to|for) (?:the|this|your|that) (?:question|search|topic|request)", r"\b(?:ir)?relevan"),
        (r"\bgrade[ _-]?[0-3]\b|\bgraded passages?\b", r"\bgrad"),
        (
            r"\b(?:this|these|the|an?|my|your)(?: \w+)? passages?\b"
            r"(?! (?:of(?! grade)|through|from|between|to|into|across|over|under|by)\b)",
            r"\bpassage",
        ),
        (r"\bpassage (?:of grade )?[0-3]\b", r"\bpassage"),
        (r"\b(?:revised|rewritten|improved|edited) (?:version|text|paragraph)\b", r"\bre(?:vis|writ)|\bedit"),
        (r"\bwhat (?:was|is|you) (?:searched|asked)\b|\blet me know if\b|\bi hope (?:this|that) helps\b", r"\bhelp"),
        (
            r"\b(?:the|this|your) (?:user'?s? |search |original )question\b|\bquestion (?:asked )?above\b"
            r"|\banswer(?:s|ing|ed)? (?:to )?(?:the|your|this) question\b(?! (?:of|whether|how|why|what))",
            r"\bquestion",
        ),
        (r"\b(?:worked example|(?:the|this) example (?:above|passage))\b", r"\bexample"),
        (r"\bas an? (?:ai|language model|assistant)\b|\bi(?:'m| am) (?:an? )?(?:ai|language model)\b", r"\bai\b|model"),
        (r"^\W*(?:sure|certainly|of course)\W+here\b", r"^\W*here"),
        (r"^\W*here(?:'s| is| are) (?:\w+ ){1,3}?(?:passages?|text|paragraph|answer|response|version)\b", r"^\W*here"),
    )
]


def text_fault(text: str, query: str) -> str:
    """The cause for which a text that was written for a query is refused; empty if there is none."""
    if _BROKEN.search(text):
        return BROKEN
    if num_words(text) < FEWEST_WORDS:
        return SHORT
    if _speaks_of_the_task(text, query):
        return META
    return COPY if _copies(text, query) else ""


def alike(text: str, others: Iterable[str]) -> bool:
    """Whether the words of a text and of one of the others are nearly the same."""
    own = set(_words(text))
    return any(_jaccard(own, set(_words(other))) > MOST_ALIKE for other in others)


def num_words(text: str) -> int:
    """Words between white space; of scripts that are written without it, pairs of neighbouring characters."""
    return max(len(text.split()), len(_words(text)))


def share_found(query: str, text: str) -> float | None:
    """The share of the query's different words that the text has; None for a query without words."""
    asked, found = set(_words(query)), set(_words(text))
    return len(asked & found) / len(asked) if asked else None


@functools.lru_cache(maxsize=64)  # a text is looked at several times, one after the other
def _words(text: str) -> tuple[str, ...]:
    return tuple(words_of([text], NGRAMS)[0])


def _jaccard(first: set[str], second: set[str]) -> float:
    together = len(first | second)
    return len(first & second) / together if together else 1.0


def _speaks_of_the_task(text: str, query: str) -> bool:
    return any(meta.search(text) and not excuse.search(query) for meta, excuse in _META)


def _copies(text: str, query: str) -> bool:
    """Whether a text has the whole query, or a long run of its words, or has no other words."""
    asked, found = _words(query), _words(text)
    if len(asked) < COPIED_WORDS[0]:
        return False
    run = min(len(asked), COPIED_WORDS[1])
    runs = {asked[place : place + run] for place in range(len(asked) - run + 1)}
    copied = any(found[place : place + run] in runs for place in range(len(found) - run + 1))
    return copied or _jaccard(set(asked), set(found)) > MOST_ALIKE
