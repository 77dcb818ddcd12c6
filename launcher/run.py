"""Run a recipe: deepspeed launcher/run.py recipes/NAME.json [--set key=value] [--stage N] [--output DIR] [--dry-run].

Checks the recipe before it imports torch; then for each stage: train, export, evaluate; then the report.
"""

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

from toolkit.ranks.last_words import (
    SECONDS_TO_SPEAK,
    STOPPED,
    Interrupted,
    end,
    end_at_signals,
    is_first_rank,
    is_told_by_another,
    say,
)
from toolkit.ranks.meeting import check_place
from toolkit.ranks.mpi import adopt_mpi_ranks
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.schema import Recipe, load_recipe


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deepspeed launcher/run.py",
        description="Train, export and evaluate a recipe.",
        epilog="Exit code: 0; 2 for a mistake that the message names; 3 if eval.stop_if_worse stopped the run after a "
        "stage (export, scores and report are written); 4 after SIGTERM or SIGUSR1, when what can be saved is saved; 5 "
        "if a rank died, stood still or went another way. After 4 and 5 the same command goes on.",
    )
    parser.add_argument("recipe", type=Path, help="a recipe (JSON)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a recipe key")
    parser.add_argument("--stage", type=int, metavar="N", help="run this stage only (counted from 0)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="run folder (default: runs/<recipe name>)")
    parser.add_argument("--dry-run", action="store_true", help="check the recipe, print the derived numbers, stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args(argv)


def main() -> int:
    """The exit code, as --help says."""
    arguments = parse_arguments()
    try:
        adopt_mpi_ranks()
        recipe = load_recipe(arguments.recipe, tuple(arguments.set))
        if arguments.stage is not None and not 0 <= arguments.stage < len(recipe.stages):
            raise RecipeError(f"--stage {arguments.stage}: the recipe has stages 0 to {len(recipe.stages) - 1}")
        run = arguments.output or Path("runs") / recipe.name
        if arguments.dry_run:
            return _dry_run(recipe, arguments.stage)
        return _run(recipe, run.resolve(), arguments.stage)
    except RecipeError as error:
        say(str(error))
        return 2
    except Exception:
        if is_told_by_another():
            os._exit(2)  # as that rank did: the process group is broken
        traceback.print_exc()
        return 1


def _dry_run(recipe: Recipe, only: int | None) -> int:
    if is_first_rank():
        from launcher.dry_run import dry_run  # imports torch and transformers, which no mistake in a recipe waits for

        text = dry_run(recipe, only, int(os.environ.get("WORLD_SIZE", "1")))
        try:
            print(text, flush=True)
        except BrokenPipeError:  # as by `| head`; nothing more can be said there, at the end of the process neither
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _run(recipe: Recipe, run: Path, only: int | None) -> int:
    if "RANK" in os.environ:
        check_place()

    # torch and DeepSpeed: a mistake in the recipe or in the place is said before they are imported, which takes seconds
    from launcher.preflight import compare_ranks
    from toolkit.collectives import RankZeroFailed
    from toolkit.ranks.process_group import start_distributed
    from toolkit.ranks.watch import LOST, Diverged, Watch

    try:
        device = start_distributed(lambda store: compare_ranks(store, recipe, run))
        with Watch() as watch:
            # transformers and much more: ranks that do not meet or whose versions differ are named before it
            from launcher.stages import run_stages

            stopped = run_stages(recipe, run, only, device, watch)
    except (Interrupted, Diverged) as ended:
        say(str(ended))
        return {Interrupted: STOPPED, Diverged: LOST}[type(ended)]
    except RankZeroFailed:  # rank 0 says why; the launcher ends it when this rank ends
        time.sleep(SECONDS_TO_SPEAK)
        return 2
    if stopped:
        say(stopped)
    return 3 if stopped else 0


if __name__ == "__main__":
    end_at_signals()
    end(main())
