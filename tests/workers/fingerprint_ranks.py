"""Worker: comparisons before steps, in each of which rank 1 differs in one thing. What each rank got is the answer."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import random_pools
from torch import nn

from toolkit import slicing
from toolkit.collectives import gather_texts, rank
from toolkit.methods.objective import Objective
from toolkit.ranks.fingerprint import Fingerprints
from toolkit.ranks.last_words import end
from toolkit.ranks.process_group import start_distributed
from toolkit.ranks.watch import Diverged

ROWS, OTHERS = "00000000000000aa", "ffffffffffffff01"


class Small(Objective):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2)


def compared(fact: str) -> Any:
    odd, module, batches = rank() == 1, Small(), random_pools(2, 4)
    fingerprints = Fingerprints(gather_texts(socket.gethostname()), weights_every=2, zero_stage=1)
    if odd and fact == "shapes of the batch":
        batches = random_pools(2, 6)
    if odd and fact == "slices":
        slicing.slices_run += 1
    asked = []
    try:
        for step in (1, 2, 3):
            if odd and step == 2 and fact == "weights":
                with torch.no_grad():
                    module.layer.weight[0, 0] += 1e-6
            digest = OTHERS if odd and step == 2 and fact == "rows" else ROWS
            asked.append(fingerprints.compare(step, digest, batches, module, asked=odd and step == 3))
    except Diverged as error:
        return str(error)
    finally:
        slicing.slices_run = 0
    return asked


if __name__ == "__main__":
    start_distributed()
    facts = ("the same", "rows", "shapes of the batch", "slices", "weights")
    answer = {fact: [json.loads(text) for text in gather_texts(json.dumps(compared(fact)))] for fact in facts}
    if rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(answer))
    end(0)
