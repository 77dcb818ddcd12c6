"""Does a passage hold an answer? Against hand-made cases and a plain search over lists of tokens."""

import unicodedata

import numpy as np
import pytest

from eval.answers import accuracies, normalised


@pytest.mark.parametrize(
    ("passage", "answer", "held"),
    [
        ("The capital is Paris.", "paris", True),  # case
        ("The capital is Paris.", "Paris.", True),
        ("The capital is Parisian", "Paris", False),  # whole tokens, not letters
        ("He was born in New  York\nCity", "new york city", True),  # white space
        ("He was born in New Jersey, York", "New York", False),  # the sequence, not the set
        ("Born in Z\u00fcrich", "Zu\u0308rich", True),  # composed and decomposed
        ("Born in Zurich", "Z\u00fcrich", False),  # accents count
        ("It cost $ 5.00", "$5.00", True),  # marks are tokens of their own
        ("It cost 500", "5.00", False),
        ("naïve", "na\u00efve", True),
        ("anything", "", False),  # an empty answer is held by nothing
        ("anything", " \u200b ", False),
    ],
)
def test_by_hand(passage: str, answer: str, held: bool):
    found = accuracies([[answer]], [passage], np.array([0]), np.array([[0]]))
    assert found["accuracy_at_5"].tolist() == [float(held)]


def test_the_naive_ways_differ():
    assert "paris" in "the capital is parisian" and normalised("Paris") not in normalised("The capital is Parisian")
    assert "Zu\u0308rich".lower() not in "Born in Z\u00fcrich".lower()


def test_against_lists_of_tokens():
    rng = np.random.default_rng(0)
    words = ["a", "B", "é", "e\u0301", "ab", "-", "1", "st."]
    passages = [" ".join(rng.choice(words, 12)) for _ in range(200)]
    answers = [[" ".join(rng.choice(words, rng.integers(1, 4))) for _ in range(2)] for _ in range(40)]
    starts = rng.integers(0, 6, len(passages))
    indices = np.array([rng.permutation(len(passages))[:120] for _ in answers])
    indices[0, 3:] = -1

    def tokens(text: str) -> list[str]:
        rows, word = [], ""
        for mark in unicodedata.normalize("NFD", text):
            kind = unicodedata.category(mark)[0]
            if kind in "LNM":
                word += mark
                continue
            rows += [word.lower()] * bool(word) + [mark.lower()] * (kind not in "ZC")
            word = ""
        return rows + [word.lower()] * bool(word)

    def held(passage: int, answer: str) -> bool:
        text, wanted = tokens(passages[passage][starts[passage] :]), tokens(answer)
        return any(text[i : i + len(wanted)] == wanted for i in range(len(text) - len(wanted) + 1))

    found = accuracies(answers, passages, starts, indices)
    for k in (5, 20, 100):
        plain = [
            float(any(held(p, answer) for p in row[:k] if p >= 0 for answer in wanted))
            for row, wanted in zip(indices, answers, strict=True)
        ]
        assert found[f"accuracy_at_{k}"].tolist() == plain
    assert 0 < found["accuracy_at_5"].mean() < found["accuracy_at_100"].mean()


def test_titles_do_not_count():
    found = accuracies([["Berlin"]], ["Berlin is a city"], np.array([7]), np.array([[0]]))
    assert found["accuracy_at_100"].tolist() == [0.0]
