"""launcher/run.py that tells, a file a rank in the folder WATCHED, who is master and which ports it opened."""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from launcher import run
from toolkit.ranks import last_words

ANY = ("00000000", "00000000000000000000000000000000")
bound: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's sockets, ours and those of libraries; what torch opens in C++ is in `listening`."""
    if event == "socket.bind" and arguments[0].family in (socket.AF_INET, socket.AF_INET6):
        bound.append(str(arguments[1]))


def listening() -> list[dict[str, Any]]:
    """The TCP ports on which this process listens now."""
    own = set()
    for path in Path("/proc/self/fd").iterdir():
        try:
            own.add(os.readlink(path))
        except FileNotFoundError:  # the descriptor that listed the folder
            continue
    found = []
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                address, port = fields[1].split(":")
                found.append({"port": int(port, 16), "any_address": address in ANY})
    return found


sys.addaudithook(watch)
last_words.end_at_signals()
code = run.main()
told = {"bound": bound, "listening": listening()} | {key: os.environ[key] for key in ("MASTER_ADDR", "MASTER_PORT")}
Path(os.environ["WATCHED"], f"{os.environ['RANK']}.json").write_text(json.dumps(told))
last_words.end(code)
