"""An evaluation that is killed: what is there of it, and that the same command goes on from it, on any ranks."""

import json
import signal
from pathlib import Path
from typing import Any

import mteb
import pytest
import torch
from beir import write_beir
from distributed import WORKERS, run_on_ranks, run_python
from mteb_local import others
from retrievers import tiny_retriever

from eval import evaluate as evaluation
from eval.compare import print_comparisons, read_system
from eval.evaluate import evaluate, evaluate_bm25
from eval.suites import load_suite
from eval.tasks import MtebTask, Task
from toolkit.recipe.evaluation import EvalSettings
from toolkit.retrieval.embed import checkpoint_digest

FILES = ("metrics.json", "per_query.json")


@pytest.fixture
def suites(tmp_path: Path) -> list[str]:
    folder = write_beir(tmp_path / "small")
    return [str(folder), str(write_beir(tmp_path / "large", num_documents=70)), f"{folder}:dev"]


@pytest.fixture
def counted(monkeypatch) -> dict[str, Any]:
    """Texts that are encoded and collections that are scored; an error in the collection numbered `fail`."""
    counts: dict[str, Any] = {"texts": 0, "scored": [], "fail": None}
    score = evaluation._score

    def counting(task: Task, rank_documents: Any) -> Any:
        def rank(*arguments: Any) -> Any:
            found = rank_documents(*arguments)
            if len(counts["scored"]) == counts["fail"]:  # queries and documents are encoded by now
                raise RuntimeError("gone")
            return found

        result = score(task, rank)
        counts["scored"].append(task.collection.name)
        return result

    monkeypatch.setattr(evaluation, "_score", counting)
    return counts


def run(system: str, suites: list[str], out: Path, counts: dict[str, Any], **settings: Any) -> dict[str, Any]:
    counts["texts"], counts["scored"] = 0, []
    if system == "bm25":
        return evaluate_bm25(suites, out, **settings)
    retriever = tiny_retriever()

    def count(module: Any, inputs: Any, output: Any) -> None:
        counts["texts"] += len(output)

    retriever.encoder.register_forward_hook(count)
    return evaluate(retriever, suites, out, label="tiny", step=None, **settings)


def read(folder: Path) -> list[Any]:
    """What a result holds, without times."""
    metrics, per_query = (json.loads((folder / name).read_text()) for name in FILES)
    for row in metrics["collections"].values():
        row.pop("seconds")
    rankings = {path.name: path.read_text() for path in sorted((folder / "rankings").iterdir())}
    return [metrics, per_query, rankings]


@pytest.mark.parametrize("system", ["dense", "bm25"])
def test_a_failure_in_the_second_collection_leaves_the_first(
    system: str, suites: list[str], counted: dict[str, Any], tmp_path: Path, capsys
):
    whole = run(system, suites, tmp_path / "whole", counted)
    said = capsys.readouterr().out.splitlines()
    lines = [line.split(", ")[0] for line in said if not line.startswith("BM25 reads ")]
    bm25 = "BM25 " if system == "bm25" else ""
    names = ["small:test", "large:test", "small:dev"]
    assert lines == [f"{name}: {bm25}nDCG@10 {whole[name]['ndcg_at_10']:.4f}" for name in names]
    counted["fail"] = 1
    with pytest.raises(RuntimeError, match="gone"):
        run(system, suites, tmp_path / "out", counted)
    metrics, per_query, _ = read(tmp_path / "out")
    assert metrics["finished"] is False and metrics["groups"] == {}  # no mean over a part
    assert list(metrics["collections"]) == list(per_query) == ["small:test"]
    assert metrics["collections"]["small:test"]["ndcg_at_10"] == whole["small:test"]["ndcg_at_10"]
    assert mteb.TaskResult.from_disk(tmp_path / "out" / "small_test.json").task_name == "small"
    counted["fail"] = None
    capsys.readouterr()
    assert run(system, suites, tmp_path / "out", counted) == whole
    assert counted["scored"] == ["large:test", "small:dev"]
    same = "same settings and data" if bm25 else "same weights, settings and data"
    assert capsys.readouterr().out.startswith(f"small:test: {bm25}scored before ({same})\n")
    if system == "dense":  # the second one's vectors were there, of its queries too; the third one's queries were not
        assert counted["texts"] == 5
    assert read(tmp_path / "out") == read(tmp_path / "whole")
    assert not (tmp_path / "out" / "vectors").exists()
    assert run(system, suites, tmp_path / "out", counted) == whole and counted["scored"] == []
    assert read(tmp_path / "out") == read(tmp_path / "whole")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_evaluation_goes_on(world_size: int, suites: list[str], tmp_path: Path):
    out = tmp_path / "out"
    request = {"suites": suites, "output": str(out), "kill_after": 1}
    if world_size == 1:
        (tmp_path / "asked.json").write_text(json.dumps(request))
        files = (str(tmp_path / name) for name in ("asked.json", "answered.json"))
        done = run_python(str(WORKERS / "killed_evaluation.py"), *files)
        assert done.returncode == -signal.SIGKILL
    else:
        with pytest.raises(AssertionError, match="ended with"):
            run_on_ranks("killed_evaluation.py", world_size, request, tmp_path)
    metrics, per_query = (json.loads((out / name).read_text()) for name in FILES)
    assert metrics["finished"] is False and list(metrics["collections"]) == list(per_query) == ["small:test"]
    answer = run_on_ranks("killed_evaluation.py", world_size, request | {"kill_after": -1}, tmp_path)
    whole = evaluate(tiny_retriever(), suites, tmp_path / "whole", label="tiny", step=None)
    assert answer == [2, whole]  # collections that were scored now
    assert read(out) == read(tmp_path / "whole") and not (out / "vectors").exists()


def test_other_weights_settings_or_data_are_scored_again(
    suites: list[str], counted: dict[str, Any], tmp_path: Path, monkeypatch
):
    out, two = tmp_path / "out", suites[:2]
    for changes in ({}, {"query_prefix": "w5 "}, {"identical_ids": "keep"}, {"prompts": {"small": "w9 "}}):
        before = [] if not changes else ["small:test", "large:test"]
        run("dense", two, out, counted, changes=EvalSettings(**changes))
        assert counted["scored"] == (before or ["small:test", "large:test"])
        run("dense", two, out, counted, changes=EvalSettings(**changes))
        assert counted["scored"] == []
    qrels = Path(two[1]) / "qrels" / "test.tsv"
    qrels.write_text("".join(qrels.read_text().splitlines(keepends=True)[:-1]))
    run("dense", two, out, counted, changes=EvalSettings(prompts={"small": "w9 "}))  # pyright: ignore[reportCallIssue]
    assert counted["scored"] == ["large:test"]
    other = tiny_retriever()
    with torch.no_grad():
        next(other.encoder.parameters()).mul_(2)
    counted["scored"] = []
    evaluate(other, two, out, label="tiny", step=None)
    assert counted["scored"] == ["small:test", "large:test"]
    counted["scored"] = []
    monkeypatch.setattr("eval.results.PACKAGES", ("torch",))  # as with other versions
    evaluate(other, two, out, label="tiny", step=None)
    assert counted["scored"] == ["small:test", "large:test"]


@pytest.mark.parametrize("part", ["metrics.json", "per_query.json", "small_test.json", "rankings/small_test.trec"])
def test_a_damaged_file_is_scored_again(part: str, suites: list[str], counted: dict[str, Any], tmp_path: Path):
    whole = run("bm25", suites[:1], tmp_path / "out", counted)
    path = tmp_path / "out" / part
    for damage in (path.unlink, lambda: path.write_text("[]")):
        damage()
        assert run("bm25", suites[:1], tmp_path / "out", counted) == whole
        assert counted["scored"] == ["small:test"] or (path.suffix == ".trec" and path.read_text() == "[]")
        if path.suffix == ".trec":
            break
    per_query = json.loads((tmp_path / "out" / "per_query.json").read_text())
    per_query["small:test"]["ndcg_at_10"]["q5"] += 0.25  # of another evaluation
    (tmp_path / "out" / "per_query.json").write_text(json.dumps(per_query))
    assert run("bm25", suites[:1], tmp_path / "out", counted) == whole and counted["scored"] == ["small:test"]


def test_means_are_written_of_whole_groups_alone(
    suites: list[str], counted: dict[str, Any], tmp_path: Path, monkeypatch
):
    tasks = [next(iter(load_suite(name))) for name in suites]
    named = {
        "beir": [task._replace(group="BEIR", member=task.collection.name) for task in tasks[:2]],
        "coir": [task._replace(group="CoIR", member=name) for task, name in ((tasks[0], "a"), (tasks[2], "b"))],
    }
    monkeypatch.setattr(evaluation, "load_suite", named.__getitem__)
    for fail, groups in ((1, []), (2, ["BEIR"]), (None, ["BEIR", "CoIR"])):
        counted["fail"] = fail
        try:
            run("bm25", list(named), tmp_path / str(fail), counted)
        except RuntimeError:
            assert fail is not None
        metrics = json.loads((tmp_path / str(fail) / "metrics.json").read_text())
        assert (list(metrics["groups"]), metrics["finished"]) == (groups, fail is None)


def test_a_task_that_mteb_scores_is_not_scored_again(counted: dict[str, Any], tmp_path: Path, monkeypatch, capsys):
    (sts, *_) = others()
    monkeypatch.setattr(evaluation, "load_suite", lambda name: [MtebTask(sts, "LocalSTS")])
    whole = run("dense", ["x"], tmp_path / "out", counted)
    encoded = counted["texts"]
    assert run("dense", ["x"], tmp_path / "out", counted) == whole
    assert (encoded > 0, counted["texts"]) == (True, 0)
    assert "LocalSTS: scored before (same weights" in capsys.readouterr().out


def test_scores_are_said_beside_those_of_bm25(suites: list[str], tmp_path: Path, capsys):
    lexical = evaluate_bm25(suites[:1], tmp_path / "bm25")["small:test"]["ndcg_at_10"]
    capsys.readouterr()
    found = evaluate(tiny_retriever(), suites[:2], tmp_path / "out", label="", step=None, beside=tmp_path / "bm25")
    first, second = capsys.readouterr().out.splitlines()
    ours = found["small:test"]["ndcg_at_10"]
    line = f"small:test: nDCG@10 {ours:.4f}, BM25 {lexical:.4f}, difference {ours - lexical:+.4f}, "
    assert first.startswith(line) and first.endswith(" s") and "BM25" not in second


def test_an_unfinished_result_is_compared_as_what_it_is(
    suites: list[str], counted: dict[str, Any], tmp_path: Path, capsys
):
    run("bm25", suites, tmp_path / "whole", counted)
    counted["fail"] = 1
    with pytest.raises(RuntimeError):
        run("dense", suites, tmp_path / "out", counted)
    assert not read_system(tmp_path / "out", "x").finished
    print_comparisons(tmp_path / "whole", [tmp_path / "out"])
    assert f"{tmp_path / 'out'}: unfinished, collections are missing" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("resumed", ["elsewhere", "bm25", "fp16", "inside"])
def test_vectors_of_an_interrupted_evaluation_do_not_stay(
    resumed: str, suites: list[str], counted: dict[str, Any], tmp_path: Path, capsys
):
    out, left = tmp_path / "out", tmp_path / "out" / "vectors"
    counted["fail"] = 1
    with pytest.raises(RuntimeError):
        run("dense", suites, out, counted)
    shards = len(list(left.rglob("*.npy")))
    assert shards > 3
    other = left / ("0" * 16) / "passage_x"
    other.mkdir(parents=True)
    (other / "00000.npy").write_bytes(b"of other weights")
    (other / "encoding.json").write_text("{}")
    counted["fail"] = None
    capsys.readouterr()
    if resumed == "bm25":
        run("bm25", suites, out, counted)
        assert f"vectors: {left}: left by an interrupted evaluation; deleted" in capsys.readouterr().out
    elif resumed == "fp16":
        run("dense", suites, out, counted, changes=EvalSettings(vectors_dtype="fp16"))  # pyright: ignore[reportCallIssue]
    elif resumed == "inside":  # they are kept where the user says so
        run("dense", suites, out, counted, vectors=left)
        assert counted["texts"] == 5 and len(list(left.rglob("*.npy"))) > shards and other.is_dir()
        return
    else:
        run("dense", suites, out, counted, vectors=tmp_path / "kept")
        line = f"vectors: {left}: left by an interrupted evaluation; {shards} shards moved to {tmp_path / 'kept'}"
        assert line in capsys.readouterr().out
        assert counted["texts"] == 5  # queries of the third collection: what was encoded is used
        assert not (tmp_path / "kept" / other.parent.name).exists()
    assert not left.exists()


@pytest.mark.parametrize("system", ["bm25", "dense", "elsewhere"])
@pytest.mark.parametrize("finished", [True, False])
def test_what_is_not_of_an_interrupted_evaluation_stays(
    finished: bool, system: str, suites: list[str], counted: dict[str, Any], tmp_path: Path
):
    """A user's own files, in any case; and vectors that a finished evaluation was told to keep there."""
    out, left = tmp_path / "out", tmp_path / "out" / "vectors"
    other = left / ("0" * 16) / "passage_x"
    other.mkdir(parents=True)
    (other / "encoding.json").write_text("{}")
    (left / "mine.txt").write_text("not the toolkit's")
    (left / "1234").mkdir()
    if finished:
        (out / "metrics.json").write_text(json.dumps({"finished": True}))
    own = left / checkpoint_digest(tiny_retriever()) / "passage_x"  # of the weights that are scored
    if finished:
        own.mkdir(parents=True)
    elsewhere = {"vectors": tmp_path / "kept"} if system == "elsewhere" else {}
    run("bm25" if system == "bm25" else "dense", suites, out, counted, **elsewhere)
    there = {path.name for path in left.iterdir()}
    assert there == {"mine.txt", "1234"} | ({"0" * 16, own.parent.name} if finished else set())
    assert own.is_dir() == finished


def test_a_damaged_result_is_no_interrupted_one(suites: list[str], counted: dict[str, Any], tmp_path: Path):
    other = tmp_path / "out" / "vectors" / ("0" * 16) / "passage_x"
    other.mkdir(parents=True)
    (other / "encoding.json").write_text("{}")
    (tmp_path / "out" / "metrics.json").write_text('{"finished": fal')
    run("bm25", suites, tmp_path / "out", counted)
    assert other.is_dir()
