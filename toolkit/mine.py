"""Hard negatives for pairs, from a corpus: `python -m toolkit.mine WHAT|bm25 --pairs PATH --output FOLDER ...`.

Also under a launcher: `deepspeed --module toolkit.mine ...` shares the texts and the searches out over the ranks.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from toolkit.collectives import on_rank_zero
from toolkit.data.beir import read_beir_texts
from toolkit.data.negatives import known_positives, mining_rows
from toolkit.data.pair_records import content_hash, read_pairs
from toolkit.data.records import read_source
from toolkit.files import expanded, replacing_folder
from toolkit.models.in_context import InContext, without_context
from toolkit.prepare.negatives import about_bm25, passages_beside
from toolkit.ranks.command import exit_code
from toolkit.ranks.last_words import end
from toolkit.ranks.roll_call import join_ranks
from toolkit.ranks.together import on_every_rank, together
from toolkit.recipe.errors import RecipeError, of_flag
from toolkit.recipe.evaluation import EvalSettings
from toolkit.recipe.pairs import FolderPairs, mine_problems
from toolkit.recipe.search import Bm25Mine, MineSettings
from toolkit.recipe.texts import FolderTexts
from toolkit.retrieval.bm25 import warn_if_nothing_found
from toolkit.retrieval.context import in_own_context
from toolkit.retrieval.embed import checkpoint_digest
from toolkit.retrieval.mining import bm25_reading, bm25_search, digest_of_all, mine, retriever_search, write_mined
from toolkit.retrieval.retrievers import load_any
from toolkit.retrieval.settings import add_model_flags, check_bm25_flags, settings_from_flags, with_settings


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m toolkit.mine", description="Mine hard negatives for pairs.")
    add_model_flags(parser)
    parser.add_argument("--pairs", required=True, metavar="PATH", help="a folder in BEIR layout, or rows of pairs")
    parser.add_argument("--split", default="train", help="judgements of a folder in BEIR layout (default: train)")
    corpus = "more passages to search: a folder in BEIR layout, or rows with text (default: those of the pairs)"
    parser.add_argument("--corpus", metavar="PATH", help=corpus)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="is made; a source of pairs")
    parser.add_argument("--ranks", required=True, type=int, nargs=2, metavar=("FROM", "TO"), help="among non-positives")
    parser.add_argument("--negatives", required=True, type=int, metavar="N", help="of a row, its own included")
    parser.add_argument("--max-share", type=float, metavar="S", help="highest score, as a share of the positive's")
    parser.add_argument("--margin", type=float, metavar="M", help="lowest difference to the positive's score")
    positive = "whose score --max-share and --margin count from: lowest, mean or highest of a row (default: highest)"
    parser.add_argument("--positive", metavar="WHICH", help=positive)
    parser.add_argument("--max-score", type=float, metavar="S", help="highest score")
    parser.add_argument("--seed", required=True, type=int, help="draws the negatives from the ranks")
    parser.add_argument("--text", choices=("prose", "code"), help="what bm25 reads")
    language = (
        "of prose, for bm25: a PyStemmer algorithm, none or ngrams (Chinese, Japanese, Thai ...); default: detected"
    )
    parser.add_argument("--language", metavar="NAME", help=language)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args(argv)
    return exit_code(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    settings, changes = _settings(arguments), _changes(arguments)
    source = _source(arguments.pairs, arguments.split)
    device = join_ranks()
    on_rank_zero(lambda: _check_output(arguments.output))
    retriever, reading = None, ""
    if arguments.what != "bm25":
        loaded = load_any(arguments.what, arguments.adapter, changes, device).retriever
        retriever = without_context(with_settings(loaded, changes))  # it reads with passages of the pairs

    def read() -> Any:
        with of_flag("--pairs"):
            records = list(read_pairs(source, Counter()))
        if not records:
            raise RecipeError(f"{arguments.pairs}: holds no pair; name rows with queries and positives")
        more = passages_beside(source, None) if arguments.corpus is None else _read_corpus(Path(arguments.corpus))
        return mining_rows(records, more, known_positives(records))

    rows = on_every_rank(read)
    about = {
        "pairs": {
            "path": arguments.pairs,
            "split": source.split,
            "content": on_rank_zero(lambda: content_hash(source)),
        },
        "corpus": arguments.corpus,
        "texts": digest_of_all(rows),
        "seed": arguments.seed,
    }
    if retriever is None:
        assert isinstance(settings, Bm25Mine)
        reading = bm25_reading(rows, settings, "the pairs", "--language")
        about["by"] = about_bm25(settings.text, reading)
        search = on_every_rank(lambda: bm25_search(rows, reading=reading))
    else:
        about["by"] = {
            "retriever": arguments.what,
            "adapter": arguments.adapter,
            "checkpoint": on_rank_zero(lambda: checkpoint_digest(retriever)),
            "settings": retriever.settings.model_dump(),
        }
        reads = in_own_context(retriever, rows.passages, len(rows.passages), arguments.pairs, arguments.seed)
        if isinstance(reads.encoder, InContext):
            about["by"]["context"] = reads.encoder.kept.about
        search = retriever_search(reads, rows)
    mined = mine(rows, search, settings, arguments.seed, 0)

    def write() -> None:
        if retriever is None:
            warn_if_nothing_found(
                "queries", int((mined.found == 0).sum()), len(mined.found), reading, "--text and --language"
            )
        with replacing_folder(arguments.output) as work:
            line = write_mined(rows, mined, settings, work, about)
        print(f"{line}\nwritten to {arguments.output}", flush=True)

    together(write)


def _settings(arguments: argparse.Namespace) -> MineSettings:
    if (arguments.what == "bm25") != (arguments.text is not None):
        raise RecipeError("--text says what bm25 reads, prose or code; give it with bm25 and with nothing else")
    if arguments.language is not None and arguments.what != "bm25":
        raise RecipeError("--language says in which language bm25 reads; give it with bm25 and with nothing else")
    given = {key: getattr(arguments, key) for key in MineSettings.model_fields}
    given = {key: value for key, value in given.items() if value is not None}
    try:
        if arguments.what == "bm25":
            of_bm25 = {"by": "bm25", "text": arguments.text, "language": arguments.language}
            settings = Bm25Mine.model_validate(given | of_bm25)
        else:
            settings = MineSettings.model_validate(given)
    except ValidationError as error:
        problems = [(str(one["loc"][0]).replace("_", "-"), one["msg"]) for one in error.errors()]
        raise RecipeError("; ".join(f"--{key}: {what[0].lower()}{what[1:]}" for key, what in problems)) from None
    if problems := [f"--{key}: {problem}" for key, problem in mine_problems(settings)]:
        raise RecipeError("; ".join(problems))
    return settings


def _changes(arguments: argparse.Namespace) -> EvalSettings:
    changes = settings_from_flags(arguments)
    if arguments.what == "bm25":
        check_bm25_flags(arguments.adapter, changes)
    return changes


def _source(path: str, split: str) -> FolderPairs:
    beir = (expanded(path) / "qrels").is_dir()
    raw = {"folder": path, "format": "beir", "split": split} if beir else {"folder": path, "format": "pairs"}
    return FolderPairs.model_validate(raw)


def _read_corpus(path: Path) -> list[str]:
    corpus = expanded(path) / "corpus.jsonl"
    if corpus.is_file():
        return list(read_beir_texts(corpus).values())
    source = FolderTexts.model_validate({"folder": str(path)})
    with of_flag("--corpus"):
        return [record.texts[0] for record in read_source(source, Counter())]


def _check_output(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder}: is there already; choose another --output, or delete it")


if __name__ == "__main__":
    end(main())
