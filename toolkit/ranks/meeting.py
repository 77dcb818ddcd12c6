"""Where the ranks of a run meet, MASTER_ADDR and MASTER_PORT: looked at before anything waits there.

Called by the command lines, before they import torch, so that other ranks have not come yet when rank 0 ends here.
"""

import ipaddress
import os
import secrets
import socket
import time

from toolkit.ranks.last_words import has_joined, is_first_rank, is_port, listens, uses_agent_store
from toolkit.recipe.errors import RecipeError

_PORT = "choose another with deepspeed --master_port N ..., or MASTER_PORT=N where mpirun or srun starts the ranks"
_ADDRESS = "with deepspeed --master_addr ADDRESS ..., or MASTER_ADDR where mpirun or srun starts the ranks"
SECONDS_TO_LEAD = 5
"""How long a connection to an address that is none of this machine's may take to come back to it."""


def check_place() -> None:
    """Check address and port of this process's run and, on rank 0, that it can open the port there.

    Raises:
        RecipeError: one line with the fix.
    """
    if has_joined():  # an earlier run of this process
        return
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port:
        name = "MASTER_PORT" if address else "MASTER_ADDR"
        raise RecipeError(
            f"{name} is not set, by which the ranks find each other; start them with deepspeed, or give every rank "
            "MASTER_ADDR, the first node, and MASTER_PORT, a free port there"
        )
    if not is_port(port):
        raise RecipeError(f"MASTER_PORT {port}: a port is a number from 1 to 65535; {_PORT}")
    if is_first_rank() and not uses_agent_store():
        _check_own(address, int(port))


def cannot_be_opened(place: str, reason: str) -> str:
    """What is said of an address with a port that rank 0 cannot open; `reason` is the system's, or torch's with it."""
    if "EACCES" in reason:
        return f"{place} cannot be opened by this user: ports below 1024 are root's; {_PORT}"
    return f"{place} is in use by another program (perhaps another run); {_PORT}"


def _check_own(address: str, port: int) -> None:
    host = socket.gethostname()
    try:
        found = {str(place[0]) for *_, place in socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise RecipeError(
            f"MASTER_ADDR {address}: is not known on {host} ({error.strerror}); name the first node {_ADDRESS}"
        ) from None
    is_own = any(map(_is_own, found))
    if listens("127.0.0.1", port) or (is_own and listens(address, port)):
        raise RecipeError(cannot_be_opened(f"{address}:{port}", "EADDRINUSE"))
    if not is_own and not _leads_here(address, port):
        raise RecipeError(
            f"MASTER_ADDR {address}: is not {host}, where rank 0 runs; name this machine {_ADDRESS}, or put the "
            "machine that it means first in the hostfile"
        )


def _is_own(address: str) -> bool:
    """Whether an address is one of this machine's: what goes there comes from there."""
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return True
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing
        except OSError:
            return False
        return probe.getsockname()[0] == address


def _leads_here(address: str, port: int) -> bool:
    """Whether connections to another address come back to a port of this machine, as through a Kubernetes service."""
    token, deadline = secrets.token_bytes(16), time.monotonic() + SECONDS_TO_LEAD
    try:
        with socket.create_server(("", port)) as server:
            server.settimeout(SECONDS_TO_LEAD)
            with socket.create_connection((address, port), timeout=SECONDS_TO_LEAD) as there:
                there.sendall(token)
                while time.monotonic() < deadline:  # other ranks may come, too
                    here, _ = server.accept()
                    with here:
                        here.settimeout(SECONDS_TO_LEAD)
                        if here.recv(len(token)) == token:
                            return True
    except OSError:
        return False
    return False
