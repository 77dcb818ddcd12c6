"""Search vectors in shards on every rank; rank 0 answers with what each rank found."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from toolkit.ranks.last_words import end
from toolkit.retrieval.search import search
from toolkit.retrieval.vectors import Shard, Vectors

torch.set_num_threads(1)
dist.init_process_group("gloo")
asked, answered = (Path(name) for name in sys.argv[-2:])
request = json.loads(asked.read_text())
documents, queries = (
    np.random.default_rng(seed).normal(size=(rows, 32)).astype(np.float32) for rows, seed in ((200, 7), (11, 8))
)
numbers = np.array_split(np.random.default_rng(0).permutation(200), request["parts"])
vectors = Vectors([Shard(part, documents[part]) for part in numbers], np.arange(200))
everyone = [None] * dist.get_world_size()
dist.all_gather_object(everyone, search(queries, vectors, request["k"])[1].tolist())
if dist.get_rank() == 0:
    answered.write_text(json.dumps(everyone))
end(0)
