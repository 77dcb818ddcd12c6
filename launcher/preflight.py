"""What all ranks must have in common, compared before a run writes anything. Called by launcher/stages.py."""

import hashlib
import json
import os
import platform
import secrets
import socket
import time
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from toolkit.collectives import gather_texts, on_rank_zero, rank, world_size
from toolkit.recipe import Recipe, RecipeError

PACKAGES = ("torch", "deepspeed", "transformers")
SECONDS_TO_APPEAR = 5
"""How long a rank looks for the file that rank 0 has written: a network file system may show it late."""
_FIXES = {
    **dict.fromkeys(("python", *PACKAGES), "use one .venv on all nodes, or install with constraints.txt on each"),
    "digest of the recipe": "give all nodes the same checkout and the same recipe file",
    "run folder": "start in the same folder on all nodes, or give --output a path that is one on all of them",
}


def compare_ranks(recipe: Recipe, run: Path) -> None:
    """Check that all ranks have the same versions, the same recipe and one run folder that all may write in.

    Nothing is left behind: the run folder is not made, and the files that ranks write for each other are removed.

    Raises:
        RecipeError: on all ranks the same, one line a problem, with the hosts that differ from most and the fix;
            RankZeroFailed on the others where rank 0 itself cannot write.
    """
    if world_size() == 1:
        return
    probe = Path(on_rank_zero(lambda: str(_write_probe(run))))
    try:
        facts = [json.loads(text) for text in gather_texts(json.dumps(own_facts(recipe, run, probe)))]
    finally:
        if rank() == 0:
            probe.unlink(missing_ok=True)
    if problems := differences(facts):
        raise RecipeError("\n".join(problems))


def own_facts(recipe: Recipe, run: Path, probe: Path) -> dict[str, Any]:
    """What this rank has, by the names in which it is told; `probe` is the file that rank 0 has written."""
    shared = _appears(probe)
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "digest of the recipe": hashlib.sha256(recipe.to_json().encode()).hexdigest()[:16],
        "run folder": str(run),
        "shared": shared,
        "denied": _denied(probe.with_name(f"{probe.name}_{rank()}")) if shared else "",
    }


def differences(facts: list[dict[str, Any]]) -> list[str]:
    """One line for each thing in which ranks differ from most of them (from rank 0 where no value has more)."""
    problems = []
    for what, fix in _FIXES.items():
        values = [fact[what] for fact in facts]
        counts = Counter(values)
        usual = max(counts, key=lambda value: (counts[value], value == values[0]))
        reference = facts[values.index(usual)]["host"]
        for value in counts:
            if value != usual:
                odd = _hosts(facts, [fact[what] == value for fact in facts])
                problems.append(f"{what}: {value} on {odd}, but {usual} on {reference}; {fix}")
    if len({fact["run folder"] for fact in facts}) > 1:
        return problems  # what that folder is to others says nothing more
    run, first = facts[0]["run folder"], facts[0]["host"]
    if not all(fact["shared"] for fact in facts):
        odd = _hosts(facts, [not fact["shared"] for fact in facts])
        problems.append(
            f"{run}: what {first} (rank 0) writes there is not seen on {odd}; put the run folder on a disk that all "
            "nodes share, at the same path (--output DIR)"
        )
    for reason in dict.fromkeys(fact["denied"] for fact in facts if fact["denied"]):
        odd = _hosts(facts, [fact["denied"] == reason for fact in facts])
        problems.append(_cannot_write(run, odd, reason))
    return problems


def _hosts(facts: list[dict[str, Any]], chosen: list[bool]) -> str:
    """The hosts of the chosen ranks, each with these ranks: "node2 (ranks 8 to 15), node3 (rank 16)"."""
    ranks = defaultdict(list)
    for number, (fact, is_chosen) in enumerate(zip(facts, chosen, strict=True)):
        if is_chosen:
            ranks[fact["host"]].append(number)
    return ", ".join(f"{host} ({_numbers(own)})" for host, own in ranks.items())


def _numbers(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def _write_probe(run: Path) -> Path:
    """A new file where the run folder is, or will be made."""
    place = next(
        folder for folder in (run, *run.parents) if os.path.exists(folder)
    )  # False also where this user may not look
    probe = place / f".seen_by_all_{secrets.token_hex(8)}"
    if reason := _denied(probe, keep=True):
        raise RecipeError(_cannot_write(str(run), f"{socket.gethostname()} (rank 0)", reason))
    return probe


def _denied(path: Path, keep: bool = False) -> str:
    """Why this rank cannot write a file there; empty if it can."""
    try:
        path.touch()
        if not keep:
            path.unlink()
    except OSError as error:
        return error.strerror or type(error).__name__
    return ""


def _cannot_write(run: str, hosts: str, reason: str) -> str:
    return f"{run}: cannot be written on {hosts} ({reason}); allow it there, or choose another --output"


def _appears(probe: Path) -> bool:
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not os.path.exists(probe):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
    return True
