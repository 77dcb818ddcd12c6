"""Texts written by a language model: `python -m toolkit.generate passages --queries WHAT --output FOLDER --seed N ...`.

Also under a launcher: `deepspeed --module toolkit.generate passages --model ...` shares the queries out over the ranks.
"""

import argparse
from pathlib import Path

from toolkit.generate.asking import Unanswered
from toolkit.generate.flags import FORMS, add_engine_flags
from toolkit.ranks.last_words import end, is_first_rank, tell

INTERRUPTED, WAITING = 130, 4


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code.

    0; 2 after one line that says what is wrong; 4 if answers of batch files are waited for; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m toolkit.generate", description="Texts by a language model.")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    commands = parser.add_subparsers(dest="command", required=True)
    _add_passages(commands.add_parser("passages", help="for queries, passages of the grades 3, 2, 1 and 0"))
    arguments = parser.parse_args(argv)
    try:
        # Here, since torch takes seconds that --help and a mistyped flag need not.
        from toolkit.generate.passages import passages
        from toolkit.ranks.command import exit_code

        return exit_code(lambda: passages(arguments))
    except Unanswered as error:
        print(f"waiting: {error.args[0]:,} requests have no answer yet; give the same command again when they have one")
        return WAITING
    except KeyboardInterrupt:
        if is_first_rank():
            tell("\ninterrupted; what is finished is kept, and the same command goes on from there")
        return INTERRUPTED


def _add_passages(parser: argparse.ArgumentParser) -> None:
    what = "rows with a query each (a file or folder), a folder in BEIR layout, or stdlib"
    parser.add_argument("--queries", required=True, metavar="WHAT", help=what)
    parser.add_argument("--split", metavar="NAME", help="of a folder in BEIR layout: whose queries (default: train)")
    parser.add_argument("--limit", type=int, metavar="N", help="so many queries, drawn by the seed (default: all)")
    output = "is made, or gone on with; a source of format graded and a folder in BEIR layout"
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help=output)
    parser.add_argument("--seed", required=True, type=int, help="draws queries, attributes, examples and answers")
    add_engine_flags(parser)
    prompt = parser.add_argument_group("what is asked")
    form = "all grades in one call, or a call for each (for models too small for four at once); default: together"
    prompt.add_argument("--form", choices=FORMS, default=FORMS[0], help=form)
    prompt.add_argument("--template", type=Path, metavar="FILE", help="prompts in place of the shipped ones")
    prompt.add_argument("--examples", type=Path, metavar="FILE", help="worked examples, of which each prompt shows one")
    check = "whether this search finds the order of the grades: bm25, or a retriever; may be repeated (default: bm25)"
    parser.add_argument("--check-by", action="append", metavar="WHAT", help=check)
    dry = "say what it will take and show one prompt; nothing is asked or written"
    parser.add_argument("--dry-run", action="store_true", help=dry)
    rate = "tokens that the model writes a second, for the hours of --dry-run"
    parser.add_argument("--tokens-per-second", type=float, metavar="N", help=rate)


if __name__ == "__main__":
    end(main())
