"""What writing passages will take, and one prompt; no network, and nothing is written. Called by the command."""

import argparse
import os
import sys
from collections.abc import Iterator

from toolkit.files import expanded
from toolkit.generate.estimate import TOKENS_PER_SENTENCE, token_counter, total
from toolkit.generate.flags import TOGETHER
from toolkit.generate.prompt import GRADES, Prompts, attributes_of, single_request, together_request
from toolkit.generate.queries import Queries, Query
from toolkit.generate.requests import Request, Sampling
from toolkit.recipe.errors import RecipeError

_LOOKED_AT = 1000  # queries whose prompts are counted
_SENTENCES = 5  # of a passage whose length is left open
_FIELD = 12  # tokens of the JSON around a passage


def dry_run(arguments: argparse.Namespace, queries: Queries, prompts: Prompts, sampling: Sampling) -> None:
    """Print calls, tokens, hours and the first prompt, into a pipe that may be closed, as by `| head`.

    Raises:
        RecipeError: for a throughput that is no number above 0.
    """
    rate = arguments.tokens_per_second
    if rate is not None and not rate > 0:
        raise RecipeError(f"--tokens-per-second: {rate} is not above 0")
    alone = arguments.server is None and arguments.batch_file is None
    folder = expanded(arguments.model) if alone and expanded(arguments.model).is_dir() else None
    count, rule = token_counter(folder)
    chosen = queries.chosen
    looked_at = chosen[:: max(1, len(chosen) // _LOOKED_AT)]
    requests = (one for query in looked_at for one in _requests(prompts, query, sampling))
    found = total(requests, count, len(chosen) / len(looked_at))
    lines = [
        f"queries: {len(chosen):,} of {queries.total:,} different ones; {queries.repeated:,} rows repeat an earlier "
        f"one, {queries.empty:,} are empty",
        f"calls: {found.calls:,} ({prompts.form}), and one more for each answer that is refused",
        f"tokens read: {found.prompt_tokens:,.0f} ({found.prompt_tokens / found.calls:,.0f} a call; {rule})",
        f"tokens written: {found.tokens:,.0f} ({found.tokens / found.calls:,.0f} a call; {TOKENS_PER_SENTENCE} a "
        f"sentence, {_SENTENCES} sentences where the length is left open)",
    ]
    if rate is None:
        lines.append("hours: add --tokens-per-second N, what the model writes a second with many requests under way")
    else:
        lines.append(f"hours: {found.tokens / rate / 3600:,.2f} at {rate:,.0f} tokens written a second")
    shown = next(_requests(prompts, chosen[0], sampling))[0]
    lines += [f"template: {prompts.hash()}", f"the first prompt ({shown.name}):", ""]
    lines += ["--- system ---", shown.system, "", "--- user ---", shown.user]
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # nothing more can be said there, at the end of the process neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _requests(prompts: Prompts, query: Query, sampling: Sampling) -> Iterator[tuple[Request, float]]:
    """The requests of a query, each with the tokens that its answer is likely to have."""
    length = attributes_of(prompts, query).get("length", "")
    expected = TOKENS_PER_SENTENCE * (int(length) if length.isdecimal() else _SENTENCES)
    if prompts.form == TOGETHER:
        tokens = len(GRADES) * (expected + _FIELD)
        yield together_request(prompts, query, 0), min(tokens, sampling.max_tokens)
        return
    better: list[str] = []
    for grade in GRADES:
        yield single_request(prompts, query, grade, better, 0), min(expected, sampling.max_tokens)
        better.append("word " * expected)
