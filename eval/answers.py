"""Open question answering: does a passage hold an answer? Top-k accuracy (Karpukhin et al. 2020, arXiv 2004.04906).

Called by eval.evaluate.
"""

import unicodedata

import numpy as np
import regex

K_VALUES = (5, 20, 100)
_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")  # words, and every other visible character alone


def accuracies(
    answers: list[list[str]], passages: list[str], body_starts: np.ndarray, indices: np.ndarray
) -> dict[str, np.ndarray]:
    """For each question whether one of its first k passages holds an answer: {"accuracy_at_5": [q], ...}, 0 or 1.

    Args:
        answers: of each question.
        passages: the documents, title and text.
        body_starts: where each one's text begins; titles do not count.
        indices: ranked passages of each question [q, k]; -1 for none.
    """
    first = np.full(len(answers), np.inf)
    for row, (wanted, ranked) in enumerate(zip(answers, indices, strict=True)):
        needles = [found for answer in wanted if (found := normalised(answer)).strip()]  # an empty one is in any text
        for place, passage in enumerate(ranked[: max(K_VALUES)], 1):
            if passage >= 0 and _holds(normalised(passages[passage][body_starts[passage] :]), needles):
                first[row] = place
                break
    return {f"accuracy_at_{k}": (first <= k).astype(np.float64) for k in K_VALUES}


def normalised(text: str) -> str:
    """A text's tokens, NFD-normalised and lower-cased, with one space around each."""
    return " " + "".join(f"{token.lower()} " for token in _TOKEN.findall(unicodedata.normalize("NFD", text)))


def _holds(text: str, needles: list[str]) -> bool:
    return any(needle in text for needle in needles)
