"""The main job on two nodes: through pdsh over ssh, and through mpirun; killed on one node, resumed, compared.

Run by make test-main.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from beir import write_beir
from distributed import free_port
from nodes import HOSTS, SECRET, Nodes, finish, require, two_nodes
from recipe_changes import changed

pytestmark = pytest.mark.main

STEPS = 12
# else mpirun refuses to run as root
MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with two_nodes(tmp_path_factory.mktemp("nodes")) as found:
        yield found


@pytest.fixture(scope="module")
def recipe(nodes: Nodes) -> Path:
    """One short stage whose optimizer and gradients are spread over both nodes, and a collection to score."""
    suite = write_beir(nodes.folder / "collection")
    content = changed(
        ("stages.0.data.sources", [{"folder": str(suite)}]),
        ("stages.0.eval.suites", [str(suite)]),
        ("stages.0.optim.steps", STEPS),
        ("stages.0.zero", {"stage": 2}),
        ("stages.0.save", {"every": 2, "keep": 2}),
    )
    content["stages"] = content["stages"][:1]
    (nodes.folder / "recipe.json").write_text(json.dumps(content))
    return nodes.folder / "recipe.json"


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def pdsh_command(nodes: Nodes, recipe: Path, run: Path, *launcher: str) -> list[str]:
    command = nodes.command("--ssh_port", nodes.ssh_port, "--master_port", free_port(), *launcher)
    return [*command, "launcher/run.py", str(recipe), "--output", str(run)]


def mpi_command(nodes: Nodes, recipe: Path, run: Path) -> list[str]:
    arguments = f"--bind-to none -x MASTER_ADDR={HOSTS[0]} -x MASTER_PORT={free_port()}"
    command = nodes.command("--launcher", "openmpi", "--no_ssh_check", "--launcher_args", arguments)
    return [*command, "launcher/run.py", str(recipe), "--output", str(run)]


def check_finished(run: Path) -> None:
    """Trained, each step logged once, exported, scored, reported; no value of a variable anywhere."""
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    stage = run / "stage_0_language_model"
    for name in ("export/export.json", "export/model.safetensors", "eval/metrics.json", "done.json"):
        assert (stage / name).is_file(), name
    assert "0 language_model" in (run / "report.md").read_text()
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world_size"] == 2 and environment["command"].startswith("deepspeed --hostfile hosts ")
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
def resumed(nodes: Nodes, recipe: Path) -> Path:
    """Through pdsh: killed on the second node, then finished by the same command."""
    require("pdsh")
    run = nodes.folder / "pdsh"
    code, said = finish(pdsh_command(nodes, recipe, run), nodes, run, kill_after=5)
    assert code != 0 and 5 <= len(rows(run)) < STEPS, said[-4000:]
    assert re.search(r"rank 1\b.*: not heard of", said), said[-4000:]
    (nodes.folder / "logs").mkdir()  # or both nodes would make it, one in vain
    logs = ("--enable_each_rank_log", str(nodes.folder / "logs"))
    code, said = finish(pdsh_command(nodes, recipe, run, *logs), nodes, run)
    assert code == 0, said[-4000:]
    return run


def test_a_run_through_pdsh_ends_when_a_node_dies_and_resumes(resumed: Path, nodes: Nodes) -> None:
    check_finished(resumed)
    written = {path.name.rpartition("_")[2]: path.read_text() for path in (nodes.folder / "logs").iterdir()}
    assert written.keys() == {"rank0.log", "rank1.log"}  # each rank's own
    starts = [line for line in written["rank0.log"].splitlines() if "starts at step" in line]
    assert len(starts) == 1 and int(starts[0].split()[-1]) >= 2 and "starts at step" not in written["rank1.log"]


def test_mpirun_trains_the_same(resumed: Path, nodes: Nodes, recipe: Path) -> None:
    """Not interrupted, and equal to the interrupted run in losses and scores."""
    require("mpirun")
    run = nodes.folder / "mpi"
    nodes.environment.update(MPI)
    code, said = finish(mpi_command(nodes, recipe, run), nodes, run)
    assert code == 0, said[-4000:]
    check_finished(run)
    for before, after in zip(rows(resumed), rows(run), strict=True):
        for key in ("stage", "step", "rows", "loss", "grad_norm", "lr", "tokens"):
            assert before[key] == after[key], (key, before, after)
    scores = [json.loads((at / "stage_0_language_model/eval/per_query.json").read_text()) for at in (resumed, run)]
    assert scores[0] == scores[1]


@pytest.mark.full
def test_a_run_through_mpirun_ends_when_a_node_dies_and_resumes(nodes: Nodes, recipe: Path) -> None:
    require("mpirun")
    run = nodes.folder / "mpi_killed"
    nodes.environment.update(MPI)
    code, said = finish(mpi_command(nodes, recipe, run), nodes, run, kill_after=5)
    assert code != 0 and 5 <= len(rows(run)) < STEPS, said[-4000:]
    code, said = finish(mpi_command(nodes, recipe, run), nodes, run)
    assert code == 0 and "starts at step 0" not in said, said[-4000:]
    check_finished(run)
