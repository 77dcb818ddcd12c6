"""Ranks that Open MPI started, told in torch's variables. Called by the commands before anything else."""

import os

from toolkit.recipe.errors import RecipeError

DEFAULT_PORT = "29500"
"""As the deepspeed launcher's."""


def adopt_mpi_ranks() -> None:
    """Set RANK and the like from mpirun's variables, if it started this process and no launcher has set them.

    No MPI is used then: mpirun only starts the processes, and torch connects them. It tells them no address, and the
    deepspeed launcher does not hand over its --master_addr to it.

    Raises:
        RecipeError: on several nodes without MASTER_ADDR.
    """
    if "RANK" in os.environ or "OMPI_COMM_WORLD_RANK" not in os.environ:
        return
    for name in ("RANK", "LOCAL_RANK", "LOCAL_SIZE"):
        os.environ[name] = os.environ[f"OMPI_COMM_WORLD_{name}"]
    os.environ["WORLD_SIZE"] = os.environ["OMPI_COMM_WORLD_SIZE"]
    os.environ.setdefault("MASTER_PORT", DEFAULT_PORT)
    if os.environ["LOCAL_SIZE"] == os.environ["WORLD_SIZE"]:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_ADDR" not in os.environ:
        raise RecipeError(
            "mpirun does not say where rank 0 is; give the address of the first node, e.g. a line "
            "MASTER_ADDR=node1 in .deepspeed_env, or mpirun -x MASTER_ADDR=node1"
        )
