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


def write_hub_layout(folder: Path, beir: Path) -> Path:
    """The same collection as the hub's datasets have it; README.md names its parts."""
    folder.mkdir(parents=True)
    for name in ("corpus.jsonl", "queries.jsonl"):
        (folder / name).write_text((beir / name).read_text())
    splits = {}
    for path in sorted((beir / "qrels").glob("*.tsv")):
        rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
        keys = ("query-id", "corpus-id", "score")
        lines = [json.dumps(dict(zip(keys, [q, d, int(grade)], strict=True))) for q, d, grade in rows]
        splits[path.stem] = f"judgements_{path.stem}.jsonl"
        (folder / splits[path.stem]).write_text("\n".join(lines) + "\n")
    configs = {"default": splits, "corpus": {"corpus": "corpus.jsonl"}, "queries": {"queries": "queries.jsonl"}}
    lines = ["---", "configs:"]
    for name, files in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, file in files.items():
            lines += [f"  - split: {split}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def write_questions(folder: Path, passages: list[tuple[str, str]], questions: list[tuple[str, list[str]]]) -> Path:
    """Open question answering: (title, text) passages p0, p1, ... and (question, answers) q0, q1, ..."""
    folder.mkdir(parents=True)
    corpus = [{"_id": f"p{i}", "title": title, "text": text} for i, (title, text) in enumerate(passages)]
    queries = [{"_id": f"q{i}", "text": text, "answers": answers} for i, (text, answers) in enumerate(questions)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
