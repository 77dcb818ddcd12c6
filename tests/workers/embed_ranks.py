"""Embed ragged texts on every rank, then texts of which one has no vector; rank 0 answers with what all ranks got."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from retrievers import ragged_texts, tiny_retriever

from toolkit.collectives import gather, rank, world_size
from toolkit.ranks.last_words import end
from toolkit.retrieval import embed
from toolkit.retrieval.embed import checkpoint_digest, encode
from toolkit.retrieval.vectors import Store

torch.set_num_threads(1)
dist.init_process_group("gloo")
asked, answered = (Path(name) for name in sys.argv[-2:])
request = json.loads(asked.read_text())
embed.SHARD_CHARACTERS, embed.SHARD_ROWS = 200, 4
retriever = tiny_retriever()
store = Store(Path(request["folder"]), checkpoint_digest(retriever)) if request["folder"] else None
answers = []
for count in request["counts"]:
    texts = {f"t{i}": text for i, text in enumerate(ragged_texts(count))}
    own = torch.from_numpy(encode(retriever, texts, "passage", store, tokens_per_batch=100).array())
    answers.append(gather(own).reshape(world_size(), *own.shape).tolist())
with torch.no_grad():
    retriever.encoder.backbone.embed_tokens.weight[3 + 7] = torch.nan


def problems_of(texts: dict[str, str]) -> list[str]:
    """What each rank was told."""
    problem = ""
    try:
        encode(retriever, texts, "passage", store)
    except (ValueError, OSError) as error:
        problem = str(error)
    problems: list[str] = [""] * world_size()
    dist.all_gather_object(problems, problem)
    return problems


def lost(path: Path) -> np.ndarray:
    raise OSError(f"lost {path.name}")


texts = {f"t{i}": f"w{i + 20}" for i in range(20)}
answer = {"vectors": answers, "problems": problems_of(texts | {"bad": "w7"})}
if rank() == world_size() - 1:
    embed.open_shard = lost
answer["lost"] = problems_of(texts)
if rank() == 0:
    answered.write_text(json.dumps(answer))
end(0)
