"""What the first rows of a stage's sources show: problems, epochs, and one row as the model gets it."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from toolkit.data.first_look import Look
from toolkit.data.graded_look import look_at_graded, put_together
from toolkit.data.graded_records import Passage
from toolkit.data.groups import Passages, in_group, joined, lacks
from toolkit.data.pairs import PairPlan
from toolkit.methods.method import Lines, Tokenizers
from toolkit.methods.preview import as_tokens
from toolkit.prepare.graded import picks_of
from toolkit.recipe.graded import GradedData, GradedSource, StdlibGraded
from toolkit.recipe.stage import Stage

_WIDE = 20.0  # e to the power of it is 5e8: how much more a passage weighs than one whose grade is lower by this


def look(source: GradedSource, data: GradedData) -> Look:
    """The first rows of a source."""
    return look_at_graded(source, data)


def warn(data: GradedData, looks: dict[int, Look]) -> Iterator[tuple[bool, str]]:
    """Rows that cannot be joined or hold too few passages, grades that say nothing, and those that are none."""
    for number, each in looks.items():
        nameless = sum(row.query_id is None for row in each.graded)
        if data.join == "query_id" and nameless:
            problem = f"{nameless} of {len(each.graded)} rows looked at have no query_id"
            yield data.faulty_rows == "refuse", f'data.sources.{number}: {problem}; set data.join to "query_text"'
        if each.graded and not any(row.passages for row in each.graded):
            problem = "no passage of the rows looked at is left by at_least and below"
            yield False, f"data.sources.{number}: {problem}; change them, or the source"
    if few := _too_few(data, looks):
        yield data.faulty_rows == "refuse", few
    if len(looks) < len(data.sources) or not all(each.graded for each in looks.values()):
        return
    grades = {passage.grade for each in looks.values() for row in each.graded for passage in row.passages}
    if len(grades) == 1:
        only = f"{grades.pop():g}"
        yield False, f"data.sources: all passages looked at have grade {only}, so that no order is learnt within a row"
    if grades and max(grades) - min(grades) > _WIDE:
        reach = f"grades looked at reach from {min(grades):g} to {max(grades):g}"
        yield (
            False,
            f"data.sources: {reach}; each counts e times as much as one that is lower by 1, as is right for grades and "
            "not for ranks or scores; set the source's grade, or a small objective.label_scale",
        )


def _too_few(data: GradedData, looks: dict[int, Look]) -> str:
    """Rows looked at that have too few passages, where a row is all that there is of a query; empty if none has."""
    first = data.sources[0]
    if isinstance(first, StdlibGraded) or first.format == "beir" or data.join is not None or 0 not in looks:
        return ""
    found = [(row.where, lacks(_numbered([row.passages]), picks_of(data), data.group)) for row in looks[0].graded]
    few = [f"{where}: {lack}" for where, lack in found if lack]
    many = f"data.sources.0: {len(few)} of {len(found)} rows looked at have too few passages, the first"
    return f"{many}: {few[0]}" if few else ""


def epochs(stage: Stage[Any, GradedData], seed: int, counts: list[int], looks: list[Look], tokenizer: Any) -> str:
    """What the steps make of the data: the sources' queries are put together only when the stage begins."""
    del looks, tokenizer
    pools, pool = stage.optim.steps * stage.batch.pools_per_step, stage.batch.pool
    if len(counts) == 1 and stage.data.join is None:
        plan = PairPlan(counts, None, pool, None, seed)
        return f"{pools / plan.pools_per_epoch:.2f} (more if rows are left out)"
    least, most = pools * pool / sum(counts), pools * pool / max(counts)
    together = "its rows" if len(counts) == 1 else "the sources' rows"
    return f"{least:.2f} to {most:.2f}, by how many of {together} are of the same query (more if rows are left out)"


def example(stage: Stage[Any, GradedData], number: int, look: Look, tokenizers: Tokenizers) -> Lines:
    """A query and the passages of its group with their grades, as far as the first rows of the sources have them."""
    data, encoder, tokenizer = stage.data, stage.encoder_settings, tokenizers("retriever")
    looks = [look if place == number else look_at_graded(source, data) for place, source in enumerate(data.sources)]
    sources = put_together(looks, data)
    if not sources:
        return [("example row", "not shown: the rows looked at have no query_id")]
    first = next(rows[0] for rows in sources if rows)
    lines = [as_tokens("query", tokenizer, first.query, encoder.query_prefix, encoder)]
    held = [[passage for row in rows for passage in row.passages] for rows in sources]
    every = [passage for own in held for passage in own]
    passages = _numbered(held)
    if lack := lacks(passages, picks_of(data), data.group):
        return [*lines, ("example passages", f"not shown: the first query looked at {lack}")]
    draw = (0, 0, 0)
    there = joined(passages, picks_of(data), draw)
    order, grade = (np.concatenate(side)[there] for side in zip(*passages, strict=True))
    for place in in_group(Passages(order, grade), data.group, draw).tolist():
        name, text = f"passage of grade {grade[place]:g}", every[there[place]].text
        lines.append(as_tokens(name, tokenizer, text, encoder.passage_prefix, encoder))
    return lines


def _numbered(held: list[list[Passage]]) -> list[Passages]:
    """Passages of each source, with numbers that are sorted as their ids are."""
    names = {name: place for place, name in enumerate(sorted({each.id or each.text for own in held for each in own}))}
    return [
        Passages(
            np.array([names[each.id or each.text] for each in own], dtype=np.int64),
            np.array([each.grade for each in own], dtype=np.float32),
        )
        for own in held
    ]
