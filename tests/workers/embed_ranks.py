"""Embed ragged texts on every rank, then texts of which one has no vector; rank 0 answers with what all ranks got."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from retrievers import ragged_texts, tiny_retriever

from toolkit import embed
from toolkit.collectives import gather, rank, world_size
from toolkit.embed import checkpoint_digest, encode
from toolkit.last_words import end
from toolkit.vectors import Store

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
problem = ""
try:
    encode(retriever, {f"t{i}": f"w{i + 20}" for i in range(20)} | {"bad": "w7"}, "passage", store)
except ValueError as error:
    problem = str(error)
problems: list[str] = [""] * world_size()
dist.all_gather_object(problems, problem)
if rank() == 0:
    answered.write_text(json.dumps({"vectors": answers, "problems": problems}))
end(0)
