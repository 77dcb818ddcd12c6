"""What is asked for a query whose passages of graded relevance are wanted: grades, attributes, examples, requests.

Called by the tasks of both forms and by the dry run. Everything drawn is a function of the seed and the query's id.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.data.lines import numbered_lines, parsed
from toolkit.data.records import check_encodable
from toolkit.determinism import generator
from toolkit.generate.flags import FORMS, ONE_BY_ONE, TOGETHER
from toolkit.generate.queries import Query
from toolkit.generate.requests import Request
from toolkit.generate.template import (
    SHIPPED,
    Text,
    check_tables,
    check_text,
    choices_of,
    fill,
    holds,
    read_template,
    template_hash,
    texts_of,
)
from toolkit.recipe.errors import RecipeError, one_line

GRADES = (3, 2, 1, 0)  # in the order in which they are written
_COMMON = frozenset({"query", "attributes", "examples", "grades"})
_EXAMPLE = frozenset({"example_query", "answer"})
_TEXTS = {
    TOGETHER: {
        "system": Text(frozenset({"grades"})),
        "user": Text(_COMMON),
        "example": Text(_EXAMPLE),
    },
    ONE_BY_ONE: {
        "system": Text(frozenset({"grades"})),
        "user": Text(_COMMON | {"wanted", "earlier"}),
        "example": Text(_EXAMPLE),
        "earlier": Text(frozenset({"passage"}), may_be_missing=True),
    },
}
_REQUIRED = {
    TOGETHER: ("query", "attributes", "examples", "grades"),
    ONE_BY_ONE: ("query", "attributes", "examples", "wanted"),
}


class Example(NamedTuple):
    """A query with a passage of every grade that somebody found right."""

    query: str
    passages: dict[int, str]  # grade -> text


class Prompts(NamedTuple):
    """All that decides what is asked for a query."""

    form: str
    grades: dict[int, str]  # what a grade means
    texts: dict[str, str]  # of the form
    attributes: dict[str, dict[str, str]]  # attribute -> name -> text
    examples: list[Example]
    seed: int

    def hash(self) -> str:
        """16 hex digits of the template, as far as it is used, without the examples."""
        return template_hash([self.form, self.grades, self.texts, self.attributes])

    def follows(self) -> bool:
        """Whether a later call for a query sees the passages before it."""
        return holds(self.texts["user"], "earlier")


def read_prompts(form: str, template: Path | None, examples: Path | None, seed: int) -> Prompts:
    """The prompts of a form.

    Args:
        template: a file in place of the shipped one.
        examples: rows of a query with a passage of each grade.

    Raises:
        RecipeError: for a template or examples that cannot be used, with the place and the fix.
    """
    path = template or SHIPPED / "passages.toml"
    at, table = one_line(path), form.replace("-", "_")
    found = read_template(path)
    check_tables(found, at, ["grades", *(name.replace("-", "_") for name in FORMS), "attributes"])
    for name in ("grades", table, "attributes"):
        if not isinstance(found.get(name), dict):
            raise RecipeError(f"{at}: the table [{name}] is missing; write it, as in the shipped template")
    wanted = [str(grade) for grade in GRADES]
    if sorted(found["grades"]) != sorted(wanted):
        raise RecipeError(f"{at}: [grades] has {', '.join(found['grades']) or 'none'}; write 3, 2, 1 and 0")
    for name in wanted:
        check_text(found["grades"][name], f"{at}: [grades] {name}")
    texts = texts_of(found[table], f"{at}: [{table}]", _TEXTS[form], _REQUIRED[form])
    attributes = choices_of(found["attributes"], f"{at}: attributes")
    grades = {grade: found["grades"][str(grade)].strip() for grade in GRADES}
    prompts = Prompts(form, grades, texts, attributes, [], seed)
    if prompts.follows() != ("earlier" in texts):
        fix = "write both, or neither of them"
        raise RecipeError(f"{at}: [{table}]: $earlier in user and the text earlier belong together; {fix}")
    return prompts if examples is None else prompts._replace(examples=_read_examples(examples))


def _read_examples(path: Path) -> list[Example]:
    found = []
    for number, line in numbered_lines(path):
        at = f"{path}: line {number}"
        row = parsed(line, at)
        fix = 'write {"query": "...", "passages": [{"text": "...", "grade": 3}, ...] } with each grade from 3 to 0 once'
        problem = RecipeError(one_line(f"{at}: is no worked example; {fix}"))
        if not isinstance(row, dict) or not isinstance(row.get("query"), str) or not row["query"].strip():
            raise problem
        passages = row.get("passages")
        if not isinstance(passages, list) or not all(isinstance(one, dict) for one in passages):
            raise problem
        texts = {one.get("grade"): one.get("text") for one in passages if isinstance(one.get("grade"), int)}
        there = len(passages) == len(GRADES) and set(texts) == set(GRADES)
        if not there or not all(isinstance(text, str) and text.strip() for text in texts.values()):
            raise problem
        check_encodable("".join([row["query"], *texts.values()]), "the worked example", at)
        found.append(Example(row["query"].strip(), {grade: texts[grade].strip() for grade in GRADES}))
    if not found:
        raise RecipeError(f"{one_line(path)}: holds no worked example; write one a line, or leave --examples out")
    return found


# --------------------------------------------------------------------------- what is drawn for a query


def attributes_of(prompts: Prompts, query: Query) -> dict[str, str]:
    """Attribute -> the name of the choice that the seed draws for this query."""
    return {
        attribute: list(choices)[int(generator("attribute", prompts.seed, attribute, query.id).integers(len(choices)))]
        for attribute, choices in prompts.attributes.items()
    }


def example_of(prompts: Prompts, query: Query) -> Example | None:
    """The worked example that the seed draws for this query; never one of the query itself."""
    others = [one for one in prompts.examples if one.query.casefold() != query.text.casefold()]
    return others[int(generator("example", prompts.seed, query.id).integers(len(others)))] if others else None


def call_seed(prompts: Prompts, query: Query, what: str, attempt: int) -> int:
    """The seed of a call's sampling, below 2^31; each attempt has its own."""
    return int(generator("call", prompts.seed, query.id, what, attempt).integers(2**31))


# --------------------------------------------------------------------------- requests


def together_request(prompts: Prompts, query: Query, attempt: int) -> Request:
    """One call for the passages of all grades."""
    example = example_of(prompts, query)
    answer = "" if example is None else json.dumps(fields(example.passages), ensure_ascii=False)
    values = _values(prompts, query, example, answer)
    return _request(prompts, query, "all", attempt, values, _SCHEMA)


def single_request(prompts: Prompts, query: Query, grade: int, better: list[str], attempt: int) -> Request:
    """One call for the passage of one grade.

    Args:
        better: the passages of higher grades that are written.
    """
    example = example_of(prompts, query)
    values = _values(prompts, query, example, "" if example is None else example.passages[grade])
    values["wanted"] = prompts.grades[grade]
    shown = [fill(prompts.texts["earlier"], {"passage": text}) for text in better] if prompts.follows() else []
    values["earlier"] = "\n\n".join(shown)
    return _request(prompts, query, str(grade), attempt, values, None)


def fields(passages: dict[int, str]) -> dict[str, str]:
    """The passages of all grades as the fields of an answer."""
    return {f"grade_{grade}": passages[grade] for grade in GRADES}


_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {f"grade_{grade}": {"type": "string"} for grade in GRADES},
    "required": [f"grade_{grade}" for grade in GRADES],
    "additionalProperties": False,
}


def _values(prompts: Prompts, query: Query, example: Example | None, answer: str) -> dict[str, str]:
    drawn = attributes_of(prompts, query)
    said = [prompts.attributes[attribute][name] for attribute, name in drawn.items()]
    shown = "" if example is None else fill(
        prompts.texts["example"], {"example_query": example.query, "answer": answer}
    )  # fmt: skip
    return {
        "query": query.text,
        "grades": "\n".join(f"Grade {grade}: {prompts.grades[grade]}" for grade in GRADES),
        "attributes": "\n".join(text.strip() for text in said if text.strip()),
        "examples": shown,
    }


def _request(
    prompts: Prompts, query: Query, what: str, attempt: int, values: dict[str, str], schema: dict[str, Any] | None
) -> Request:
    return Request(
        name=f"{query.id}/{what}/{attempt}",
        system=fill(prompts.texts["system"], values),
        user=fill(prompts.texts["user"], values),
        schema=schema,
        seed=call_seed(prompts, query, what, attempt),
    )
