"""Worker: says what this process was like at its start, changes all of it, then ends as the request says."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import toolkit.collectives
from toolkit.ranks.last_words import end

request = json.loads(Path(sys.argv[-2]).read_text())
rank = int(os.environ["RANK"])
found = {
    "dtype": str(torch.get_default_dtype()),
    "deterministic": torch.are_deterministic_algorithms_enabled(),
    "torch": torch.rand(1).item(),
    "patched": hasattr(toolkit.collectives, "left_behind"),
    "variable": os.environ.get("LEFT_BEHIND"),
    "joined": dist.is_initialized(),
    "signal": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    "folder": os.getcwd(),
    "module": "unclean_other" in sys.modules,
}
different = {
    "order": list({"a", "b", "c", "d", "e", "f", "g", "h"}),
    "numpy": np.random.rand(),
    "random": random.random(),
}
dist.init_process_group("gloo")
everyone: list[dict] = [{}] * dist.get_world_size()
dist.all_gather_object(everyone, different)
torch.set_default_dtype(torch.float64)
torch.use_deterministic_algorithms(True)
torch.manual_seed(rank + 5)
toolkit.collectives.left_behind = True  # pyright: ignore
os.environ["LEFT_BEHIND"] = "1"
signal.signal(signal.SIGTERM, signal.SIG_IGN if request["stays"] else signal.SIG_DFL)
os.chdir("/")
sys.modules["unclean_other"] = sys
if rank == 0:
    Path(sys.argv[-1]).write_text(json.dumps([found, everyone]))
print(f"rank {rank} was here", flush=True)
if request["fails"] == rank:
    raise ValueError(f"rank {rank} is damaged")
if request["fails"] is not None:
    time.sleep(300)  # as in a collective that the other has left
end(0)
