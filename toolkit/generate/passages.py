"""The command that writes passages: queries in, a folder of passages of graded relevance out, exactly once each.

Called by the command line. Every rank asks for its share of the queries and writes its own part of the journal.
"""

import argparse
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import torch

from toolkit.collectives import rank, world_size
from toolkit.generate.asking import ask
from toolkit.generate.dry_run import dry_run
from toolkit.generate.engines import open_engine
from toolkit.generate.flags import TOGETHER, check_engine_flags, model_asked_for, sampling_of
from toolkit.generate.graded_files import RECORD, REPORT, Sampled, sample, write_files
from toolkit.generate.order import BM25, Order, bm25_of, check_search, find_search, order_of, retriever_of
from toolkit.generate.progress import Progress
from toolkit.generate.prompt import Prompts, read_prompts
from toolkit.generate.queries import Queries, read_queries
from toolkit.generate.report import Report, write_report
from toolkit.generate.requests import Engine, Sampling
from toolkit.generate.tasks import task_of
from toolkit.generate.template import template_hash
from toolkit.generate.written import Part, begun_with, check_same, finished, held, is_empty, mend, write_run, writing
from toolkit.ranks.last_words import is_first_rank
from toolkit.ranks.roll_call import join_ranks
from toolkit.ranks.together import on_every_rank, together
from toolkit.recipe.errors import RecipeError

MOST_TOKENS = {True: 2048, False: 512}  # of an answer: with all grades, with one
LOOKED_AT = 1000  # queries whose passages the report measures


class Job(NamedTuple):
    """What a command asks for."""

    queries: Queries
    prompts: Prompts
    sampling: Sampling
    output: Path
    begun_with: dict[str, Any]  # what must be the same at every start
    source: dict[str, Any]
    checks: list[str]


def passages(arguments: argparse.Namespace) -> None:
    """Write passages for queries, or go on with that, as the flags say.

    Raises:
        RecipeError: for whatever the user can mend.
        Unanswered: if the answers of batch files are not there yet.
    """
    check_engine_flags(arguments)
    if arguments.tokens_per_second is not None and not arguments.dry_run:
        raise RecipeError("--tokens-per-second: only --dry-run reads it; leave it out")
    if arguments.limit is not None and arguments.limit < 1:
        raise RecipeError(f"--limit: {arguments.limit} is no number of queries; write 1 or more")
    for check in arguments.check_by or []:
        check_search(check)
    if arguments.dry_run:
        if is_first_rank():
            dry_run(arguments, *_asked(arguments))
        return
    device = join_ranks()
    if world_size() > 1 and (arguments.server is not None or arguments.batch_file is not None):
        raise RecipeError("only --model alone is shared out over ranks; start this without a launcher, as one process")
    job = on_every_rank(lambda: _job(arguments))
    for check in job.checks:
        find_search(check)
    with ExitStack() as stack:
        together(lambda: stack.enter_context(held(job.output)))
        session = together(lambda: _begin(job, arguments))
        _write(job, arguments, device, session)
        _finish(job, device)


def _asked(arguments: argparse.Namespace) -> tuple[Queries, Prompts, Sampling]:
    prompts = read_prompts(arguments.form, arguments.template, arguments.examples, arguments.seed)
    sampling = sampling_of(arguments, MOST_TOKENS[arguments.form == TOGETHER])
    return read_queries(arguments.queries, arguments.split, arguments.limit, arguments.seed), prompts, sampling


def _job(arguments: argparse.Namespace) -> Job:
    queries, prompts, sampling = _asked(arguments)
    begun = {
        "command": "passages",
        "queries (digest)": queries.digest,
        "seed": arguments.seed,
        "form": prompts.form,
        "template (hash)": prompts.hash(),
        "examples (hash)": template_hash(prompts.examples) if prompts.examples else "none",
        **sampling._asdict(),
    }
    source = {
        "what": arguments.queries,
        "split": arguments.split,
        "total": queries.total,
        "repeated": queries.repeated,
        "empty": queries.empty,
    }
    return Job(queries, prompts, sampling, arguments.output, begun, source, arguments.check_by or [BM25])


def _begin(job: Job, arguments: argparse.Namespace) -> str:
    """Make the folder, or see that it holds this generation; returns a name for this session."""
    mend(job.output)
    limit, found = len(job.queries.chosen), begun_with(job.output)
    if found is None or is_empty(job.output):  # a start that came to nothing, for want of its engine, binds nobody
        found = {"begun_with": job.begun_with, "model": None, "limit": limit, "engines": {}}
    check_same(job.output, found["begun_with"], job.begun_with)
    asked_for = model_asked_for(arguments)
    if asked_for is not None:
        _same_model(job, found, asked_for)
    if limit < found["limit"]:
        was, fix = f"{found['limit']:,} queries", "give as many or more, or choose another --output"
        raise RecipeError(f"{job.output}: was begun with {was}, now {limit:,} (--limit); {fix}")
    write_run(job.output, found | {"limit": limit, "model": asked_for or found["model"]})
    repeated, empty = job.queries.repeated, job.queries.empty
    if repeated or empty:
        print(f"queries: {repeated:,} rows repeat an earlier one, {empty:,} are empty; they are left out", flush=True)
    return str(time.time_ns())


def _same_model(job: Job, found: dict[str, Any], model: str) -> None:
    if found["model"] is not None:
        check_same(job.output, {"model": found["model"]}, {"model": model})


def _write(job: Job, arguments: argparse.Namespace, device: torch.device, session: str) -> None:
    """Ask for what is not finished; this rank's share of it."""
    done = on_every_rank(lambda: finished(job.output))
    left = [query for query in job.queries.chosen if query.id not in done]
    if not left:
        if rank() == 0:
            print(f"{job.output}: all {len(job.queries.chosen):,} queries are finished; nothing is asked", flush=True)
        return
    succeeded = any(place.kept for place in done.values())
    engine = on_every_rank(lambda: open_engine(arguments, job.sampling, device, succeeded))
    together(lambda: _keep_engine(job, arguments, engine, session))
    before = (len(job.queries.chosen) - len(left)) // world_size()
    own = left[rank() :: world_size()]
    with closing(Part(job.output, rank())) as part, Progress(before + len(own), before, "queries", rank() == 0) as bar:
        began = time.monotonic()
        for task in ask(engine, (task_of(job.prompts, query) for query in own), bar.heard):
            assert task.record is not None
            part.append(task.record | {"session": session, "seconds": round(time.monotonic() - began, 3)})
            bar.add(task.record)
    together(lambda: _keep_engine(job, arguments, engine, session))


def _keep_engine(job: Job, arguments: argparse.Namespace, engine: Engine, session: str) -> None:
    """Write down what the engine says of itself; RecipeError for another model than the folder was begun with."""
    found, told = begun_with(job.output), engine.describe()
    assert found is not None
    model = model_asked_for(arguments) or str(told["model"])
    _same_model(job, found, model)
    write_run(job.output, found | {"model": model, "engines": found["engines"] | {session: told}})


# --------------------------------------------------------------------------- the finished folder


def _finish(job: Job, device: torch.device) -> None:
    """Write the data, look at a sample of it, and write what it came to."""
    places = on_every_rank(lambda: finished(job.output))
    sampled = on_every_rank(lambda: sample(job.queries.chosen, places, LOOKED_AT, job.prompts.seed))
    orders = [_order(check, sampled, job.prompts.seed, device) for check in job.checks] if sampled else []
    run = together(lambda: begun_with(job.output))

    def write() -> str:
        about = {"model": run["model"], "template": job.prompts.hash()}
        engines = _each_once(list(run["engines"].values()))
        with writing(job.output):
            counts = write_files(job.output, job.queries.chosen, places, about)
            write_report(job.output, Report(job.source, job.begun_with, run["model"], engines, counts, sampled, orders))
        if not counts.kept:
            raise RecipeError(f"{job.output}: no query has a passage of every grade; see {REPORT} there for the causes")
        return (
            f"{counts.kept:,} queries have a passage of every grade, {counts.queries - counts.kept:,} are dropped; "
            f"{counts.causes.total():,} of {counts.calls:,} answers were refused"
        )

    line = together(write)
    if rank() == 0:
        print(f"{line}\nwritten to {job.output}: see {REPORT} and {RECORD}", flush=True)


def _each_once(told_by: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the engines of all sessions said of themselves, without what another one says and more: a session that was
    killed does not know how it was answered."""
    said = [{key: value for key, value in told.items() if value not in ([], None)} for told in told_by]

    def is_less(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return one != other and all(key in other and other[key] == value for key, value in one.items())

    return [
        told
        for place, told in enumerate(told_by)
        if said[place] not in said[:place] and not any(is_less(said[place], other) for other in said)
    ]


def _order(check: str, sampled: list[Sampled], seed: int, device: torch.device) -> Order:
    if check == BM25:
        reading, scores = on_every_rank(lambda: bm25_of(sampled))
        return order_of(f"BM25 ({reading})", scores, seed)
    return order_of(check, retriever_of(check, sampled, device), seed)
