"""The passages of one query: asked for together or grade by grade, let through or asked for once more, kept or dropped.

Called by the command that writes passages; toolkit.generate.asking brings the answers.
"""

from collections.abc import Iterable
from typing import Any

from toolkit.generate import gate
from toolkit.generate.flags import TOGETHER
from toolkit.generate.parse import graded_texts, plain_text
from toolkit.generate.prompt import (
    GRADES,
    Prompts,
    attributes_of,
    call_seed,
    example_of,
    single_request,
    together_request,
)
from toolkit.generate.queries import Query
from toolkit.generate.requests import Answer, Request
from toolkit.recipe.errors import one_line

ATTEMPTS = 2  # a refused answer is asked for once more, with another seed


class Common:
    """What both forms keep of a query's calls."""

    def __init__(self, prompts: Prompts, query: Query) -> None:
        self.record: dict[str, Any] | None = None
        self._prompts, self._query = prompts, query
        example = example_of(prompts, query)
        self._shown = list(example.passages.values()) if example else []
        self._calls, self._prompt_tokens, self._tokens = 0, 0, 0
        self._causes: list[str] = []
        self._reasons: list[str] = []

    def _count(self, answer: Answer) -> None:
        self._calls += 1
        self._prompt_tokens += answer.prompt_tokens
        self._tokens += answer.tokens

    def _refuse(self, cause: str, answer: Answer) -> None:
        self._causes.append(cause)
        if answer.failed:
            self._reasons.append(one_line(answer.failed, 300))

    def _fault(self, text: str, others: Iterable[str]) -> str:
        cause = gate.text_fault(text, self._query.text)
        if not cause and gate.alike(text, self._shown):
            return gate.EXAMPLE
        return gate.ALIKE if not cause and gate.alike(text, others) else cause

    def _finish(self, passages: dict[int, tuple[str, int]]) -> None:
        """Keep the passages (grade -> text and seed of its call), or drop the query if there are none."""
        self.record = {
            "id": self._query.id,
            "kept": bool(passages),
            "attributes": attributes_of(self._prompts, self._query),
            "passages": [
                {"grade": grade, "text": passages[grade][0], "seed": passages[grade][1]} for grade in GRADES if passages
            ],
            "causes": self._causes,
            "reasons": self._reasons,
            "calls": self._calls,
            "prompt_tokens": self._prompt_tokens,
            "tokens": self._tokens,
        }


class Together(Common):
    """All grades in one call; a call of which one passage is refused is made again as a whole."""

    def __init__(self, prompts: Prompts, query: Query) -> None:
        super().__init__(prompts, query)
        self._attempt = 0

    def start(self) -> list[Request]:
        return [together_request(self._prompts, self._query, 0)]

    def take(self, answer: Answer) -> list[Request]:
        self._count(answer)
        texts = graded_texts(answer.text, GRADES)
        cause = gate.REFUSED if answer.failed else self._cause(texts, answer.cut)
        if not cause:
            seed = call_seed(self._prompts, self._query, "all", self._attempt)
            self._finish({grade: (texts[grade], seed) for grade in GRADES})
            return []
        self._refuse(cause, answer)
        self._attempt += 1
        if answer.failed or self._attempt == ATTEMPTS:
            self._finish({})
            return []
        return [together_request(self._prompts, self._query, self._attempt)]

    def _cause(self, texts: dict[int, str], cut: bool) -> str:
        if len(texts) < len(GRADES):
            return gate.CUT if cut else gate.MISSING
        written: list[str] = []
        for grade in GRADES:
            if cause := self._fault(texts[grade], written):
                return cause
            written.append(texts[grade])
        return ""


class OneByOne(Common):
    """A call for each grade; a passage that is refused is asked for again alone, and the better ones stay."""

    def __init__(self, prompts: Prompts, query: Query) -> None:
        super().__init__(prompts, query)
        self._written: dict[int, tuple[str, int]] = {}
        self._asked: dict[str, tuple[int, int]] = {}  # name of a request -> grade and attempt

    def start(self) -> list[Request]:
        """The best grade, whose passage the later calls see; all of them if the template shows none."""
        first = GRADES[:1] if self._prompts.follows() else GRADES
        return [self._request(grade, 0) for grade in first]

    def take(self, answer: Answer) -> list[Request]:
        grade, attempt = self._asked.pop(answer.name)
        self._count(answer)
        text = plain_text(answer.text)
        written = [text for text, _ in self._written.values()]
        cause = gate.REFUSED if answer.failed else gate.CUT if answer.cut else self._fault(text, written)
        if not cause:
            self._written[grade] = (text, call_seed(self._prompts, self._query, str(grade), attempt))
        else:
            self._refuse(cause, answer)
            if not answer.failed and attempt + 1 < ATTEMPTS:
                return [self._request(grade, attempt + 1)]
        return self._further(grade, bool(cause))

    def _further(self, grade: int, given_up: bool) -> list[Request]:
        """What is asked after a grade is written or given up; without one of them the query is dropped."""
        if self._prompts.follows() and not given_up and grade != GRADES[-1]:
            return [self._request(GRADES[GRADES.index(grade) + 1], 0)]
        if not self._asked:
            self._finish(self._written if len(self._written) == len(GRADES) else {})
        return []

    def _request(self, grade: int, attempt: int) -> Request:
        better = [self._written[each][0] for each in GRADES if each in self._written and each > grade]
        request = single_request(self._prompts, self._query, grade, better, attempt)
        self._asked[request.name] = (grade, attempt)
        return request


def task_of(prompts: Prompts, query: Query) -> Together | OneByOne:
    """The task of a query in the form that the prompts have."""
    return Together(prompts, query) if prompts.form == TOGETHER else OneByOne(prompts, query)
