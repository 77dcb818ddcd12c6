"""Evaluate a folder on every rank, dense and BM25; rank 0 answers with what each rank got."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from retrievers import tiny_retriever

from eval.evaluate import evaluate, evaluate_bm25
from toolkit.export.write import load_export
from toolkit.ranks.last_words import end
from toolkit.recipe.evaluation import EvalSettings

torch.set_num_threads(1)
dist.init_process_group("gloo")
asked, answered = (Path(name) for name in sys.argv[-2:])
suite, output, contextual = json.loads(asked.read_text())
own = [
    evaluate(tiny_retriever(), [suite], Path(output) / "dense", label="", step=None),
    evaluate_bm25([suite], Path(output) / "bm25"),
]
if contextual:
    reads = load_export(Path(contextual), "cpu")
    changes = EvalSettings.model_validate({"context": {"from": "corpus"}})
    own.append(evaluate(reads, [suite], Path(output) / "read", label="", step=None, changes=changes))
everyone = [None] * dist.get_world_size()
dist.all_gather_object(everyone, own)
if dist.get_rank() == 0:
    answered.write_text(json.dumps(everyone))
end(0)
