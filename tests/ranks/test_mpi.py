"""mpirun's variables become torch's; the address of the first node must be given where there are several."""

import os

import pytest

from toolkit.ranks.mpi import adopt_mpi_ranks
from toolkit.recipe.errors import RecipeError

TORCH = ("RANK", "LOCAL_RANK", "LOCAL_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def mpirun(monkeypatch: pytest.MonkeyPatch):
    """Rank 5 of 8, the second of its node; what the function sets is taken back."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in TORCH:
        os.environ.pop(name, None)
    ranks = {"RANK": "5", "SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
    os.environ.update({f"OMPI_COMM_WORLD_{name}": value for name, value in ranks.items()})


def told() -> list[str | None]:
    return [os.environ.get(name) for name in TORCH]


def test_several_nodes_need_an_address(mpirun) -> None:
    with pytest.raises(RecipeError, match="mpirun -x MASTER_ADDR=node1"):
        adopt_mpi_ranks()


def test_an_address_and_a_port_that_are_given_stay(mpirun) -> None:
    os.environ |= {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
    adopt_mpi_ranks()
    assert told() == ["5", "1", "4", "8", "node1", "1234"]


def test_one_node_is_its_own_master(mpirun) -> None:
    os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] = "8"
    adopt_mpi_ranks()
    assert told() == ["5", "1", "8", "8", "127.0.0.1", "29500"]


def test_ranks_of_another_launcher_stay(mpirun) -> None:
    os.environ["RANK"] = "0"
    adopt_mpi_ranks()
    assert told() == ["0", *[None] * 5]
