"""A small collection in BEIR layout, with graded judgements, a query without judgements and titles."""

import json
from pathlib import Path

from retrievers import ragged_texts


def write_beir(folder: Path, num_documents: int = 60, num_queries: int = 12) -> Path:
    """Write it: every query shares words with its relevant documents; splits dev and test."""
    texts = ragged_texts(num_documents, longest=12)
    corpus = [{"_id": f"d{i}", "title": "w9" if i % 2 else "", "text": text} for i, text in enumerate(texts)]
    queries = [{"_id": f"q{i}", "text": texts[i].split()[0] + " w7"} for i in range(num_queries)]
    qrels = {f"q{i}": {f"d{i}": 2, f"d{i + 20}": 1, f"d{i + 40}": 0} for i in range(num_queries - 1)}
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, wanted in (("dev", range(5)), ("test", range(5, num_queries - 1))):
        lines = [f"q{i}\t{d}\t{grade}\n" for i in wanted for d, grade in qrels[f"q{i}"].items()]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder
