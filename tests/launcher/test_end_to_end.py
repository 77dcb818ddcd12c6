"""The main job on two ranks: train, kill, resume, export, evaluate, report. Run by make test-main."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import REPOSITORY, WORKERS, free_port, launch, pooled, rank_environment, run_python
from recipe_changes import changed
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCALARS = (
    "loss", "lr", "grad_norm", "tokens_per_s", "rows_per_s", "peak_memory_gib", "data_wait", "row_entropy",
    "weight_same_document", "rows_with_gradient", "kept_sources", "dropped_mass", "keys_values_mib_sent",
    "keys_values_mib_least", "temperature", "gain", "in_batch_nll", "plain_nll",
)  # fmt: skip
pytestmark = pytest.mark.main
STEPS = 14
SECRET = "hf_kYpQw0aXnTzVbMdR"
STAGES = ("language_model", "revela", "recontriever", "contrastive")
METHODS: dict[str, dict[str, Any]] = {  # of the stages after Revela: they continue its adapter
    "recontriever": {
        "objective": {
            "name": "recontriever", "temperature": 0.05, "views": 2, "relevance": "linear",
            "queue": {"size": 64, "momentum": 0.9},
        },
        "data": {"crops": {"chunk_tokens": 48, "min_ratio": 0.1, "max_ratio": 0.5, "delete": 0.1}},
    },
    "contrastive": {
        "objective": {"name": "contrastive", "temperature": 0.1, "learn_temperature": True},
        "data": {"negatives": 1},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of four short stages with dropout, a corpus and a collection in BEIR layout to evaluate on."""
    root = tmp_path_factory.mktemp("end_to_end")
    source = sorted((REPOSITORY / "toolkit").rglob("*.py"))
    beir = root / "collection"
    (beir / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": "", "text": path.read_text()[:1500]} for i, path in enumerate(source)]
    queries = [{"_id": f"q{i}", "text": path.stem.replace("_", " ")} for i, path in enumerate(source)]
    (beir / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    (beir / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    pairs = [{"anchor": q["text"], "positive": d["text"]} for q, d in zip(queries, documents, strict=True)]
    for row, other in zip(pairs, documents[1:] + documents[:1], strict=True):
        row["negative"] = other["text"]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    judgements = "".join(f"q{i}\td{i}\t1\n" for i in range(len(source)))
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judgements)
    recipe = changed()
    for stage in recipe["stages"]:
        stage["data"]["sources"] = [{"folder": str(beir)}]
        stage["eval"]["suites"] = [str(beir)]
        stage["optim"]["steps"], stage["save"] = STEPS, {"every": 2, "keep": 2}
    revela = recipe["stages"][1]
    batch = {"pool": 8, "span": "world", "pools_per_step": 2, "forward_tokens": 64}
    recipe["stages"] += [revela | {"name": name, "batch": batch} | METHODS[name] for name in STAGES[2:]]
    recipe["stages"][2]["data"] = METHODS["recontriever"]["data"] | {"sources": [{"folder": str(beir)}]}
    source = {"folder": str(root / "pairs.jsonl"), "format": "pairs"}
    recipe["stages"][3]["data"] = METHODS["contrastive"]["data"] | {"sources": [source]}
    recipe["stages"][1]["lora"]["dropout"] = recipe["stages"][1]["objective"]["language_model"]["lora"]["dropout"] = 0.1
    (root / "recipe.json").write_text(json.dumps(recipe))
    return root


@pytest.fixture(scope="module")
def whole(work: Path) -> Path:
    """An uninterrupted run, whose ranks note the ports that they open."""
    run = [str(work / "recipe.json"), "--output", str(work / "whole")]
    (work / "watched").mkdir()
    done = launch(WORKERS / "watched_run.py", 2, *run, WATCHED=str(work / "watched"), HF_TOKEN=SECRET)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (work / "whole.txt").write_text(done.stdout)
    return work / "whole"


def log(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_is_promised(whole: Path, work: Path) -> None:
    for name in ("recipe.json", "environment.json", "report.md", "stage_1_revela/eval/metrics.json"):
        assert (whole / name).is_file(), name
    assert len(list((whole / "stage_1_revela" / "checkpoints").iterdir())) == 2  # keep
    rows = log(whole)
    assert [(row["stage"], row["step"]) for row in rows] == [
        (stage, step) for stage in STAGES for step in range(1, STEPS + 1)
    ]
    board = EventAccumulator(str(whole / "tensorboard"))
    board.Reload()
    for name in SCALARS:
        points = board.Scalars(f"revela/{name}")
        assert [point.step for point in points] == list(range(STEPS + 1, 2 * STEPS + 1)), name
        assert [point.value for point in points] == [np.float32(row[name]) for row in rows[STEPS : 2 * STEPS]], name
    for name in (
        "recontriever/negative_weights",
        "recontriever/pair_nll",
        "contrastive/accuracy",
        "contrastive/padding",
    ):
        assert len(board.Scalars(name)) == STEPS, name
    temperatures = [point.value for point in board.Scalars("contrastive/temperature")]
    assert temperatures[0] == np.float32(0.1) and temperatures[-1] != temperatures[0]
    steps = [point.step for point in board.Scalars("eval/collection:test/ndcg_at_10")]
    assert steps == [STEPS * stage for stage in range(len(STAGES) + 1)]
    report = (whole / "report.md").read_text()
    for row in ("BM25", "untrained", *(f"{index} {stage}" for index, stage in enumerate(STAGES))):
        assert row in report and row in (work / "whole.txt").read_text(), row
    for index, stage in enumerate(STAGES):
        others = ["BM25", "untrained", *(f"{before} {STAGES[before]}" for before in [index - 1] if index)]
        table = report.partition(f"### {index} {stage} against\n")[2].partition("\n#")[0].splitlines()
        assert [line.split("|")[1].strip() for line in table if "collection:test" in line] == others
    assert f"deepspeed --num_gpus 2 launcher/run.py {work / 'recipe.json'} --output {whole}\n" in report
    assert len(re.findall(r"!\[.*\]\((plots/.*\.png)\)", report)) == 3 + len(STAGES)
    for image in re.findall(r"\]\((.*\.png)\)", report):
        assert (whole / image).is_file(), image


def test_no_port_is_opened_but_those_of_torch(whole: Path, work: Path) -> None:
    """Python code binds none; torch.distributed listens for its rendezvous, on rank 0, and gloo at one address each."""
    ranks = [json.loads((work / "watched" / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["bound"] for rank in ranks] == [[], []]
    assert [rank["MASTER_ADDR"] for rank in ranks] == ["127.0.0.1", "127.0.0.1"]
    at_any_address = [{port["port"] for port in rank["listening"] if port["any_address"]} for rank in ranks]
    assert at_any_address == [{int(ranks[0]["MASTER_PORT"])}, set()]
    assert all(rank["listening"] for rank in ranks)


def test_no_environment_variable_is_written(whole: Path) -> None:
    files = [path for path in whole.rglob("*") if path.is_file()]
    assert len(files) > 50 and not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("stage", ["stage_1_revela", "stage_2_recontriever", "stage_3_contrastive"])
def test_the_export_loads_and_its_check_is_recorded(whole: Path, stage: str) -> None:
    export = whole / stage / "export"
    check = json.loads((export / "export.json").read_text())["check"]
    assert set(check["figures"]) == {"query", "passage", "merged_query", "merged_passage"}
    assert all(check["figures"][name] <= check["limits"][name] for name in check["figures"])
    vectors = [SentenceTransformer(str(folder)).encode(["read a file"]) for folder in (export, export / "merged")]
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-5 and abs(np.linalg.norm(vectors[0]) - 1) < 1e-5
    adapter = load_file(export / "adapter_model.safetensors")
    assert all(np.abs(weight).max() > 0 for weight in adapter.values())  # both A and B have moved


def test_evaluate_alone_gives_the_scores_of_the_run(whole: Path, work: Path) -> None:
    export = whole / "stage_1_revela" / "export"
    suite = ("--suite", str(work / "collection"), "--output", str(work / "alone"))
    done = run_python("-m", "eval.run", str(export), *suite)
    assert done.returncode == 0 and "nDCG@10" in done.stdout, done.stderr[-2000:]
    scores = [
        json.loads((folder / "per_query.json").read_text())
        for folder in (whole / "stage_1_revela" / "eval", work / "alone")
    ]
    assert scores[0] == scores[1] and len(scores[0]["collection:test"]["ndcg_at_10"]) > 20


def costs(run: Path) -> list[list[str]]:
    """Of each stage and of all: rows, tokens and operations as the report tells them."""
    table = (run / "report.md").read_text().partition("| rows in the data")[2].splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:6]] for line in itertools.takewhile(bool, table)]
    assert len(rows) == len(STAGES) + 1
    return rows


def end_after(lines: int, run: Path, work: Path, number: signal.Signals) -> str:
    """Start the run and send a signal to all its processes once its log has so many lines; what they said."""
    command = ["deepspeed", "--num_gpus", "2", "--master_port", free_port(), "launcher/run.py"]
    command += [str(work / "recipe.json"), "--output", str(run)]
    with (work / "killed.txt").open("w") as output:
        process = subprocess.Popen(
            command, env=rank_environment(), cwd=REPOSITORY, stdout=output, stderr=output, start_new_session=True
        )
        deadline = time.monotonic() + 400
        while len(log(run)) < lines and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        os.killpg(process.pid, number)
        assert process.wait(timeout=60) == -number  # a shell shows 128 + number
        deadline = time.monotonic() + 30
        with suppress(ProcessLookupError):  # once all are gone: the launcher may go before its ranks
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(0.1)
    return (work / "killed.txt").read_text()


def test_a_killed_run_goes_on_with_the_next_batch(whole: Path, work: Path) -> None:
    """Kill every process in one stage, press Ctrl-C in the next, start the same command again: equal losses and
    equal weights."""
    run = work / "killed"
    shutil.copytree(whole, run)
    for index, stage in enumerate(STAGES[1:], start=1):
        shutil.rmtree(run / f"stage_{index}_{stage}")
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(lines[:STEPS]))
    starts, advice = [], "interrupted; the same command goes on from the last checkpoint, if there is one"
    # Revela; ReContriever, whose queue and momentum copy must come back too
    for stage, number in ((1, signal.SIGKILL), (2, signal.SIGINT)):
        said = end_after(stage * STEPS + 3, run, work, number)
        reached = len(log(run)) - stage * STEPS
        assert 3 <= reached < STEPS, said[-3000:]
        assert said.splitlines().count(advice) == (number == signal.SIGINT), said[-3000:]
        starts.append([reached - reached % 2, reached - reached % 2 - 2])  # a save under way may be lost
    again = pooled("launcher/run.py", 2, str(work / "recipe.json"), "--output", str(run))
    assert again.returncode == 0, (again.stdout + again.stderr)[-4000:]
    said += again.stdout
    resumed = [int(line.split()[-1]) for line in said.splitlines() if "starts at step" in line]
    assert resumed[0] in starts[0] and resumed[1] == 0 and resumed[2] in starts[1], (resumed, starts)
    for before, after in zip(log(whole), log(run), strict=True):
        for key in ("stage", "step", "rows", "loss", "grad_norm", "lr", "tokens", "flops"):
            assert before[key] == after[key], (key, before, after)
    assert costs(run) == costs(whole)
    for index, stage in enumerate(STAGES[1:], start=1):
        for name in ("adapter_model.safetensors", "merged/model.safetensors"):
            a, b = (load_file(folder / f"stage_{index}_{stage}" / "export" / name) for folder in (whole, run))
            assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a), (stage, name)
