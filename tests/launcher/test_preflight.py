"""Hosts that differ from the others are named before a run writes anything."""

import json
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import WORKERS, free_port, pooled
from recipe_changes import TINY
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from launcher import preflight
from launcher.preflight import compare_ranks, differences, own_facts
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.schema import load_recipe

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"}
SAME = VERSIONS | {"digest of the recipe": "a1", "run folder": "/shared/run", "shared": True, "denied": ""}
SAME |= {"device": "GPU", "GPUs": 8, "local rank": 0}


def ranks(*hosts: str, **odd: dict[str, Any]) -> list[dict[str, Any]]:
    """What ranks on these hosts have; `odd`: of some of the hosts, what they have of their own."""
    return [SAME | {"host": host} | odd.get(host, {}) for host in hosts]


def test_equal_ranks_pass() -> None:
    assert differences(ranks("a", "a", "b", "b")) == []


def test_the_odd_host_is_the_one_that_differs_from_most() -> None:
    newer = {"torch": "2.14.0"}
    fix = "use one .venv on all nodes, or install with constraints.txt on each"
    assert differences(ranks("a", "b", "c", a=newer)) == [
        f"torch: 2.14.0 on a (rank 0), but 2.13.0 on b; {fix}",
    ]
    assert differences(ranks("a", "b", b=newer)) == [f"torch: 2.14.0 on b (rank 1), but 2.13.0 on a; {fix}"]
    assert differences(ranks("a", "b", a=newer)) == [f"torch: 2.13.0 on b (rank 1), but 2.14.0 on a; {fix}"]


def test_hosts_with_one_problem_are_one_line_and_each_problem_is_told() -> None:
    odd = {"python": "3.12.1", "digest of the recipe": "b2"}
    lines = differences(ranks(*"aaaabbccdd", b=odd, c=odd | {"shared": False}, d={"denied": "Permission denied"}))
    assert [line.partition(";")[0] for line in lines] == [
        "python: 3.12.1 on b (ranks 4 to 5), c (ranks 6 to 7), but 3.11.7 on a",
        "digest of the recipe: b2 on b (ranks 4 to 5), c (ranks 6 to 7), but a1 on a",
        "/shared/run: what a (rank 0) writes there is not seen on c (ranks 6 to 7)",
        "/shared/run: cannot be written on d (ranks 8 to 9) (Permission denied)",
    ]
    assert differences(ranks(*"abab", b={"denied": "Read-only file system"})) == [
        "/shared/run: cannot be written on b (ranks 1, 3) (Read-only file system); allow it there, or choose another "
        "--output"
    ]


def test_run_folders_at_different_places_are_one_problem() -> None:
    lines = differences(ranks(*"abc", c={"run folder": "/home/run", "shared": False}))
    assert lines == [
        "run folder: /home/run on c (rank 2), but /shared/run on a; start in the same folder on all nodes, or give "
        "--output a path that is one on all of them"
    ]


def test_ranks_without_a_gpu_are_named() -> None:
    """However many they are; and a node whose GPUs are not found at all."""
    facts = [fact | {"GPUs": 2, "local rank": k % 4} for k, fact in enumerate(ranks(*"aaaabbbb"))]
    assert [line.partition(";")[0] for line in differences(facts)] == [
        "no GPU of its own for a (ranks 2 to 3), b (ranks 6 to 7)"
    ]
    lines = differences(ranks(*"aab", b={"device": "CPU", "GPUs": 0}))
    assert lines == ["device: CPU on b (rank 2), but GPU on a; see nvidia-smi there"]


@pytest.fixture
def recipe(tmp_path: Path):
    (tmp_path / "recipe.json").write_text(json.dumps(TINY))
    return load_recipe(tmp_path / "recipe.json")


def test_a_rank_tells_what_it_has(recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    probe = tmp_path / "probe"
    probe.touch()
    before = sorted(tmp_path.iterdir())
    facts = own_facts(recipe, tmp_path / "run", probe)
    assert facts.keys() == SAME.keys() | {"host"} and facts["host"] == socket.gethostname()
    assert facts["shared"] and not facts["denied"] and facts["run folder"] == str(tmp_path / "run")
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.setattr(preflight, "SECONDS_TO_APPEAR", 0.2)
    assert not own_facts(recipe, tmp_path / "run", tmp_path / "elsewhere")["shared"]
    assert (facts["device"], facts["GPUs"], facts["local rank"]) == ("CPU", 0, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    facts = own_facts(recipe, tmp_path, probe)
    assert (facts["device"], facts["GPUs"], facts["local rank"]) == ("GPU", 2, 3)
    changed = recipe.model_copy(update={"seed": recipe.seed + 1})
    assert own_facts(changed, tmp_path, probe)["digest of the recipe"] != facts["digest of the recipe"]


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch):
    """The store of two ranks, of which this process is the first."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    store = TCPStore("127.0.0.1", int(free_port()), 2, is_master=True, wait_for_workers=False)
    store.set("arrived/1", "node2")
    return store


def test_a_folder_that_rank_0_cannot_write_is_refused(recipe, tmp_path, two_ranks) -> None:
    """What the other has is told all the same."""
    (tmp_path / "file").touch()
    other = own_facts(recipe, tmp_path / "file" / "run", None) | {"host": "node2", "torch": "2.0.1"}
    two_ranks.set("preflight/1", json.dumps(other))
    with pytest.raises(RecipeError) as raised:
        compare_ranks(two_ranks, recipe, tmp_path / "file" / "run")
    version, denied = str(raised.value).splitlines()
    assert version.startswith("torch: 2.0.1 on node2 (rank 1), but ")
    assert re.search(rf"file/run: cannot be written on {socket.gethostname()} \(rank 0\) \(", denied)
    two_ranks.set("preflight/1", json.dumps(other | own_facts(recipe, tmp_path / "not" / "made", None)))
    compare_ranks(two_ranks, recipe, tmp_path / "not" / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "recipe.json"]


def test_a_rank_that_does_not_answer_is_named(recipe, tmp_path, two_ranks, monkeypatch) -> None:
    """To the others too, who wait for the first."""
    monkeypatch.setattr(preflight, "SECONDS_TO_ANSWER", 0.5)
    with pytest.raises(RecipeError, match=r"^rank 1 \(node2\): no answer for 0.5 s; ") as raised:
        compare_ranks(two_ranks, recipe, tmp_path / "run")
    told = str(raised.value)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(RecipeError) as raised:
        compare_ranks(two_ranks, recipe, tmp_path / "run")
    assert str(raised.value) == told
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_a_first_rank_that_is_gone_is_named(recipe, tmp_path, monkeypatch) -> None:
    """Its store goes with it, while the others wait."""
    port = free_port()
    opened = f"store = TCPStore('127.0.0.1', {port}, 2, is_master=True, wait_for_workers=False)"
    code = f"import time; from torch.distributed import TCPStore; {opened}; time.sleep(600)"
    first = subprocess.Popen([sys.executable, "-c", code])
    try:
        store = TCPStore("127.0.0.1", int(port), 2, wait_for_workers=False)
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        threading.Timer(1, first.kill).start()
        with pytest.raises(RecipeError, match=rf"^rank 0: does not answer {socket.gethostname()}: it was killed, or"):
            compare_ranks(store, recipe, tmp_path / "run")
    finally:
        first.kill()
        first.wait()


def test_an_odd_rank_is_refused_in_a_run(tmp_path: Path) -> None:
    """Nothing is left behind, and rank 0 says it all once."""
    (tmp_path / "recipe.json").write_text(json.dumps(TINY))
    odd = {"torch": "2.0.1", "shared": False}
    run = ["--output", str(tmp_path / "runs" / "odd")]
    done = pooled(WORKERS / "odd_rank.py", 2, str(tmp_path / "recipe.json"), *run, timeout=500, ODD=json.dumps(odd))
    said = (done.stdout + done.stderr).splitlines()
    here = socket.gethostname()
    told = [line.partition(";")[0] for line in said if "node2" in line]
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(told) == 3, said
    assert told[0].startswith("torch: 2.0.1 on node2 (rank 1), but ") and told[0].endswith(f" on {here}"), said
    assert re.fullmatch(rf"digest of the recipe: \w{{16}} on node2 \(rank 1\), but \w{{16}} on {here}", told[1]), said
    assert told[2] == f"{tmp_path}/runs/odd: what {here} (rank 0) writes there is not seen on node2 (rank 1)", said
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]
