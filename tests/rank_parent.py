"""A process that has imported what ranks need and forks them on request; started and fed by tests/distributed.py.

A forked rank begins as a launched one does, only that its imports are done: what a worker changes in its process
(dtypes, seeds, patches, process groups) ends with it. It dies with this process, and that with the tests.
"""

import ctypes
import gc
import importlib
import os
import pkgutil
import runpy
import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

PACKAGES = ("toolkit", "eval", "launcher")
LIBRARIES = (  # what those import inside functions, or libraries when a model or an engine is made
    "deepspeed", "deepspeed.module_inject", "deepspeed.runtime.zero.muon.muon_optimizer", "faiss",
    "matplotlib.pyplot", "mteb", "peft", "peft.tuners.lora", "sentence_transformers", "torch.profiler",
    "torch.utils.cpp_extension", "torch.utils.tensorboard", "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3",
)  # fmt: skip
PR_SET_PDEATHSIG = 1


def import_all() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    for package in PACKAGES:
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(module.name)


def die_with(parent: int) -> None:
    """From now on the end of the parent ends this process."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def become(arguments: list[str], environment: dict[str, str], output: list[str], parent: int) -> int:
    """In a forked process: `python ARGUMENTS` with this environment, its output in files; its exit code."""
    die_with(parent)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    np.random.seed()  # as at its import: else all ranks would draw the same numbers
    is_module = arguments[0] == "-m"
    sys.argv = arguments[is_module:]
    sys.path[0] = os.getcwd() if is_module else os.path.dirname(arguments[0])
    try:
        if is_module:
            sys.modules.pop(sys.argv[0], None)
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork_ranks(asked: Connection, request: dict[str, Any], own: int) -> None:
    """Fork the ranks of a request; tell which process each is, and how each ended."""
    ranks: dict[int, int] = {}
    for rank, (arguments, environment) in request["ranks"].items():
        if (pid := os.fork()) == 0:
            asked.close()
            code = become(arguments, environment, request["output"], own)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        ranks[pid] = rank
        asked.send(("begun", rank, pid))
    while ranks:
        pid, status = os.wait()
        asked.send(("ended", ranks.pop(pid), os.waitstatus_to_exitcode(status)))


def main() -> None:
    die_with(int(sys.argv[1]))
    asked = Connection(int(sys.argv[2]))
    import_all()
    gc.freeze()  # pages stay shared
    own = os.getpid()
    with suppress(EOFError):  # the tests are through
        while True:
            fork_ranks(asked, asked.recv(), own)


if __name__ == "__main__":
    main()
