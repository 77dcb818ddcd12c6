"""What all ranks must have in common, compared before a run writes anything. Called by launcher/stages.py."""

import hashlib
import json
import os
import platform
import secrets
import socket
import time
from collections import Counter, defaultdict
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.distributed import DistNetworkError, DistStoreError

from toolkit.recipe.errors import RecipeError
from toolkit.recipe.schema import Recipe

PACKAGES = ("torch", "deepspeed", "transformers")
SECONDS_TO_ANSWER = 120
SECONDS_TO_APPEAR = 5
"""How long a rank looks for the file that rank 0 has written: a network file system may show it late."""
_PROBE, _VERDICT = "preflight/file of rank 0", "preflight/problems"
_FIXES = {
    **dict.fromkeys(("python", *PACKAGES), "use one .venv on all nodes, or install with constraints.txt on each"),
    "device": "see nvidia-smi there",
    "digest of the recipe": "give all nodes the same checkout and the same recipe file",
    "run folder": "start in the same folder on all nodes, or give --output a path that is one on all of them",
}


def compare_ranks(store: Any, recipe: Recipe, run: Path) -> None:
    """Check that all ranks have the same versions, devices and recipe, and one run folder that all may write in.

    Through the store in which the ranks have met, before NCCL or gloo starts: versions that differ may end that without
    a word of the reason. Nothing is left behind: the run folder is not made, the files that ranks write for each other
    are removed.

    Raises:
        RecipeError: on all ranks the same, one line a problem, with the hosts that differ from most and the fix; or
            that a rank does not answer.
    """
    own, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if own > 0:
        (probe,) = _answers(store, [_PROBE], SECONDS_TO_ANSWER)
        store.set(f"preflight/{own}", json.dumps(own_facts(recipe, run, Path(probe) if probe else None)))
        (problems,) = _answers(store, [_VERDICT], 2 * SECONDS_TO_ANSWER)
    else:
        probe = _probe(run)
        denied = _denied(probe, keep=True)
        try:
            store.set(_PROBE, "" if denied else str(probe))
            facts = own_facts(recipe, run, None if denied else probe)
            answers = _answers(store, [f"preflight/{rank}" for rank in range(1, ranks)], SECONDS_TO_ANSWER)
            everyone = [facts | {"denied": denied or facts["denied"]}, *map(json.loads, answers)]
            problems = "\n".join(differences(everyone))
        except RecipeError as error:
            problems = str(error)
        finally:
            if not denied:
                probe.unlink(missing_ok=True)
        store.set(_VERDICT, problems)
    if problems:
        raise RecipeError(problems)


def _answers(store: Any, keys: list[str], seconds: float) -> list[str]:
    """What other ranks have left under these keys: "preflight/<rank>", or rank 0 under its own."""
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except DistNetworkError:
        raise RecipeError(f"rank 0: does not answer {socket.gethostname()}: it was killed, or is cut off") from None
    except DistStoreError:
        missing = [key.removeprefix("preflight/") for key in keys if not store.check([key])]
        ranks = [int(key) if key.isdecimal() else 0 for key in missing]
        named = ", ".join(f"rank {rank} ({store.get(f'arrived/{rank}').decode()})" for rank in ranks[:8])
        raise RecipeError(
            f"{named}: no answer for {seconds} s; see what its node says, and that the disk of {Path.cwd()} and of the "
            "run folder answers there"
        ) from None
    return [text.decode() for text in store.multi_get(keys)]


def own_facts(recipe: Recipe, run: Path, probe: Path | None) -> dict[str, Any]:
    """What this rank has, by the names in which it is told; `probe` is the file of rank 0, None without one."""
    shared = probe is None or _appears(probe)
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "device": "GPU" if torch.cuda.is_available() else "CPU",
        "GPUs": torch.cuda.device_count(),
        "local rank": int(os.environ.get("LOCAL_RANK", "0")),
        "digest of the recipe": hashlib.sha256(recipe.to_json().encode()).hexdigest()[:16],
        "run folder": str(run),
        "shared": shared,
        "denied": _denied(probe.with_name(f"{probe.name}_{os.environ['RANK']}")) if probe and shared else "",
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
    lacking = [fact["device"] == "GPU" and fact["local rank"] >= fact["GPUs"] for fact in facts]
    if any(lacking):
        problems.append(
            f"no GPU of its own for {_hosts(facts, lacking)}; give each node as many slots in the hostfile "
            "(--num_gpus) as it has GPUs, or see CUDA_VISIBLE_DEVICES there"
        )
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
        problems.append(f"{run}: cannot be written on {odd} ({reason}); allow it there, or choose another --output")
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


def _probe(run: Path) -> Path:
    """The path of a new file where the run folder is, or will be made."""
    place = next(
        folder for folder in (run, *run.parents) if os.path.exists(folder)
    )  # False also where this user may not look
    return place / f".seen_by_all_{secrets.token_hex(8)}"


def _denied(path: Path, keep: bool = False) -> str:
    """Why this rank cannot write a file there; empty if it can."""
    try:
        path.touch()
        if not keep:
            path.unlink()
    except OSError as error:
        return error.strerror or type(error).__name__
    return ""


def _appears(probe: Path) -> bool:
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not os.path.exists(probe):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
    return True
