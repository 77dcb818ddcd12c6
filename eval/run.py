"""The command `python -m eval.run WHAT --suite NAME ...`: score any retriever, or BM25, on suites of collections."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eval.compare import print_comparisons, read_system
from eval.contexts import beside, check_context, contexts_beside, label_of
from eval.evaluate import evaluate, evaluate_bm25
from eval.results import MAIN, file_name
from eval.suites import check_prompts, expand
from toolkit.collectives import on_rank_zero, rank
from toolkit.ranks.command import exit_code
from toolkit.ranks.last_words import end
from toolkit.ranks.roll_call import join_ranks
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.evaluation import EvalSettings
from toolkit.retrieval.retrievers import load_any
from toolkit.retrieval.settings import add_model_flags, check_bm25_flags, settings_from_flags

SUITE = (
    "stage, beir, coir, bright, msmarco, stdlib:dev, stdlib:test, FOLDER, FOLDER:split, quick:FOLDER, quick (of every "
    "FOLDER that is named), an mteb task or benchmark, or NAME=FOLDER with its data on disk; repeatable"
)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 after one line that says what is wrong."""
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.run", description="Score a retriever or BM25 on collections.")
    of_model = add_model_flags(parser)
    parser.add_argument("--suite", action="append", required=True, metavar="NAME", help=SUITE)
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: WHAT/eval/<suite>, or eval_<name>")
    kept = "keep the vectors here, found again for the same weights; default: in the output while it runs"
    parser.add_argument("--vectors", type=Path, metavar="DIR", help=kept)
    parser.add_argument("--vectors-dtype", choices=("fp32", "fp16"), default="fp32", help="fp16 takes half the disk")
    parser.add_argument(
        "--bm25-cache", type=Path, metavar="DIR", help="keep BM25's indices here, found again for the same documents"
    )
    parser.add_argument("--no-bm25", action="store_true", help="score the retriever alone")
    parser.add_argument("--compare", type=Path, action="append", default=[], metavar="DIR", help="an earlier result")
    prompts = "prefix of all texts of an mteb task or type of task, e.g. 'Clustering=cluster: '; repeatable"
    of_model.add_argument("--prompt", action="append", default=[], metavar="TASK=TEXT", help=prompts)
    ids = "documents whose id equals the query's: task (default), keep or drop"
    of_model.add_argument("--identical-ids", default="task", metavar="HOW", help=ids)
    text = "what BM25 reads; default: code for the embedded corpus, else prose"
    of_model.add_argument("--bm25-text", choices=("prose", "code"), help=text)
    language = (
        "of prose, for BM25: a PyStemmer algorithm, none or ngrams (Chinese, Japanese, Thai ...); default: detected"
    )
    of_model.add_argument("--bm25-language", metavar="NAME", help=language)
    context = "of a contextual retriever: corpus, none, a folder in BEIR layout, or a context's file; repeatable"
    of_model.add_argument("--context", action="append", default=[], metavar="FROM", help=context)
    seed = "draws the documents of the context (default: 0)"
    of_model.add_argument("--context-seed", type=int, metavar="N", help=seed)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser


def _settings(arguments: argparse.Namespace) -> EvalSettings:
    prompts: dict[str, str] = {}
    for prompt in arguments.prompt:
        task, equals, text = prompt.partition("=")
        if not equals:
            raise RecipeError(f"--prompt {prompt}: write TASK=TEXT")
        prompts[task] = text
    if arguments.context_seed is not None and not arguments.context:
        raise RecipeError("--context-seed: draws a context; add --context, or leave it out")
    context = None
    if arguments.context:
        first, *others = arguments.context
        context = {"from": first, "seed": arguments.context_seed or 0, "beside": others}
    return settings_from_flags(
        arguments,
        prompts=prompts,
        identical_ids=arguments.identical_ids,
        bm25_text=arguments.bm25_text,
        bm25_language=arguments.bm25_language,
        vectors_dtype=arguments.vectors_dtype,
        context=context,
    )


def _run(arguments: argparse.Namespace) -> None:
    what, output, changes = arguments.what, arguments.output, _settings(arguments)
    if what == "bm25" and arguments.no_bm25:
        raise RecipeError("--no-bm25: bm25 is what is scored; leave one of the two out")
    if changes.bm25_text == "code" and changes.bm25_language is not None:
        raise RecipeError("--bm25-language: code is read without a language; leave it or --bm25-text out")
    if arguments.no_bm25 and (changes.bm25_text or changes.bm25_language):
        raise RecipeError("--no-bm25: nothing reads --bm25-text and --bm25-language then; drop them")
    if what == "bm25":
        check_bm25_flags(arguments.adapter or arguments.vectors, changes)
    device = join_ranks()
    suites = on_rank_zero(lambda: expand(arguments.suite))
    on_rank_zero(lambda: _check_ahead(arguments, changes, suites))
    rows: dict[str, Path] = {}
    if what == "bm25":
        folder = rows["BM25"] = output or Path("eval_bm25")
        evaluate_bm25(suites, folder, changes, arguments.bm25_cache)
    else:
        retriever, prompts = load_any(what, arguments.adapter, changes, device)
        changes = changes.model_copy(update={"prompts": prompts | changes.prompts})
        folder = output or _default_output(what, arguments.suite)
        rows = ({} if arguments.no_bm25 else {"BM25": folder / "bm25"}) | {"retriever": folder}
        if not arguments.no_bm25:  # before the retriever, whose scores are then said beside its
            evaluate_bm25(suites, rows["BM25"], changes, arguments.bm25_cache)
        label = what if arguments.adapter is None else f"{what} with {arguments.adapter}"
        given = {"step": None, "vectors": arguments.vectors, "beside": rows.get("BM25")}
        evaluate(retriever, suites, folder, label=label, changes=changes, **given)
        for place, others in contexts_beside(changes):
            rows[label_of(place)] = beside(folder, place)
            with_it = f"{label}, {label_of(place)}"
            evaluate(retriever, suites, rows[label_of(place)], label=with_it, changes=others, **given)
        rows["retriever"] = rows.pop("retriever")  # the table ends with it
    if rank() == 0:
        _print_table(rows)
        _print_comparisons(folder, rows, arguments.compare)


def _check_ahead(arguments: argparse.Namespace, changes: EvalSettings, suites: list[str]) -> None:
    """Raise RecipeError, before anything is scored, for what would be seen after it, or never."""
    check_prompts(changes.prompts, suites)
    check_context(changes)
    for folder in arguments.compare:
        read_system(folder, str(folder))
    for flag in ("output", "vectors", "bm25_cache"):
        if (folder := getattr(arguments, flag)) is not None:
            _check_place("--" + flag.replace("_", "-"), folder.absolute())


def _check_place(flag: str, folder: Path) -> None:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise RecipeError(f"{flag} {folder}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK):
        raise RecipeError(f"{flag} {folder}: {there} cannot be written; name another folder")


def _print_comparisons(folder: Path, rows: dict[str, Path], others: list[Path]) -> None:
    """The result against BM25, where that has scores of two queries or more of a collection, and the earlier ones."""
    others = [*(place for label, place in rows.items() if label.startswith("context ")), *others]
    if "retriever" in rows and "BM25" in rows:
        lexical = read_system(rows["BM25"], "BM25")
        if any(len(lexical.main_scores(name)) > 1 for name in lexical.metrics):
            others = [rows["BM25"], *others]
    if others:
        print_comparisons(folder, others)


def _default_output(what: str, suites: list[str]) -> Path:
    """Beside an export; results of a model that is not ours go into the working directory."""
    name = file_name("+".join(Path(suite).name for suite in suites))
    own = (Path(what) / "export.json").is_file()
    return (Path(what) / "eval" if own else Path(f"eval_{file_name(Path(what).name)}")) / name


def _print_table(rows: dict[str, Path]) -> None:
    found = {label: json.loads((folder / "metrics.json").read_text("utf-8")) for label, folder in rows.items()}
    last, lines = list(found.values())[-1], []
    for kind in ("collections", "groups"):
        for name in last[kind]:
            for label, metrics in found.items():
                if name in metrics[kind]:
                    lines.append([name, *_cells(metrics[kind][name], label)])
    titles = ("collection", "documents", "queries", "", "nDCG@10", "Recall@100", "MRR@10", "others")
    shown = [column for column in range(len(titles)) if any(line[column] for line in lines)]
    table = Table(show_edge=False)
    for column in shown:
        is_text = titles[column] in ("collection", "", "others")
        table.add_column(titles[column], justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for line in lines:
        table.add_row(*(line[column] for column in shown))
    console = Console()
    console.print(table)
    for name, row in last["collections"].items():
        if row.get("judged_documents_missing"):
            console.print(f"{name}: {row['judged_documents_missing']} judged documents are not in the corpus")
    if last["skipped"]:
        console.print(f"left out, since BM25 makes no vectors: {', '.join(last['skipped'])}")
    console.print(f"written to {list(rows.values())[-1]}")


def _cells(row: dict[str, Any], label: str) -> list[str]:
    sizes = [f"{row[key]:,}" if key in row else "" for key in ("documents", "queries")]
    counts = {"main_score", "documents", "queries", "judged_documents_missing", "identical_ids_dropped", "seconds"}
    others = [f"{key} {row[key]:.4f}" for key in row if key not in {*MAIN, *counts} and isinstance(row[key], float)]
    if isinstance(row["main_score"], float) and row["main_score"] != row.get(MAIN[0]):  # a group's mean
        others.append(f"mean of main scores {row['main_score']:.4f}")
    return [*sizes, label, *(f"{row[key]:.4f}" if key in row else "" for key in MAIN), ", ".join(others)]


if __name__ == "__main__":
    end(main())
