"""What a suite's name means, and one clear line for every name or file that is wrong."""

import json
from pathlib import Path

import mteb
import pytest
from beir import write_beir, write_hub_layout, write_questions
from datasets import Dataset

from eval.folders import shrink
from eval.suite_names import SUITES
from eval.suites import data_state, expand, load_suite
from eval.tasks import MtebTask
from toolkit.recipe.errors import RecipeError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_beir(tmp_path / "small")


def error(name: str | Path) -> str:
    with pytest.raises(RecipeError) as caught:
        list(load_suite(str(name)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder(folder: Path):
    (task,) = load_suite(str(folder))
    name, documents, queries, qrels = task.collection
    assert name == "small:test"
    assert (len(documents), list(queries), list(qrels)) == (60, [f"q{i}" for i in range(5, 11)], list(queries))
    first, second = (json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()[:2])
    assert documents["d0"] == first["text"]
    assert documents["d1"] == "w9 " + second["text"]
    assert qrels["q5"] == {"d5": 2, "d25": 1, "d45": 0}
    assert (task.code, task.main_score, task.split, task.candidates) == (False, "ndcg_at_10", "test", None)


def test_split(folder: Path):
    (dev,) = load_suite(f"{folder}:dev")
    (test,) = load_suite(str(folder))
    assert list(dev.collection.queries) == [f"q{i}" for i in range(5)]
    assert dev.collection.documents == test.collection.documents
    assert dev.revision != test.revision
    (folder / "qrels" / "test.tsv").unlink()
    (only,) = load_suite(str(folder))
    assert only.collection == dev.collection
    (folder / "qrels" / "dev.tsv").rename(folder / "qrels" / "a.tsv")
    (folder / "qrels" / "b.tsv").write_text((folder / "qrels" / "a.tsv").read_text())
    assert f"found {folder}:a, {folder}:b" in error(folder)
    assert f"found {folder}:a, {folder}:b" in error(f"{folder}:dev")


def test_revision_is_that_of_the_content(folder: Path):
    (before,) = load_suite(str(folder))
    (again,) = load_suite(str(folder))
    assert before.revision == again.revision
    corpus = folder / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("w9", "w8", 1))
    (after,) = load_suite(str(folder))
    assert before.revision != after.revision


@pytest.mark.parametrize(
    ("file", "number", "line", "message"),
    [
        ("corpus.jsonl", 3, "{", "corpus.jsonl: line 3: not JSON (Expecting"),
        ("corpus.jsonl", 2, '{"_id": "x"}', "corpus.jsonl: line 2: write"),
        ("corpus.jsonl", 2, '["x"]', "corpus.jsonl: line 2: write"),
        ("corpus.jsonl", 4, '{"_id": "x", "text": "a", "title": 3}', "corpus.jsonl: line 4: title is no text"),
        ("queries.jsonl", 2, '{"_id": "q0", "text": "again"}', "queries.jsonl: line 2: _id 'q0' stands in an earlier"),
        ("qrels/test.tsv", 1, "q5\td5\t1", "test.tsv: line 1: the header is missing"),
        ("qrels/test.tsv", 3, "q5\t0\td5\t1", "test.tsv: line 3: write query-id, corpus-id and a whole number"),
        ("qrels/test.tsv", 3, "q5\td5\thigh", "test.tsv: line 3: write query-id, corpus-id and a whole number"),
        ("qrels/test.tsv", 2, "q99\td5\t1", "test.tsv: line 2: query 'q99' is not in queries.jsonl"),
    ],
)
def test_malformed_line(folder: Path, file: str, number: int, line: str, message: str):
    path = folder / file
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines))
    assert message in error(folder)


def test_files_that_are_missing_or_empty(folder: Path):
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    assert "test.tsv: holds no judgement" in error(f"{folder}:test")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tother\t1\n")
    assert "no judged document is in corpus.jsonl" in error(f"{folder}:test")
    (folder / "corpus.jsonl").write_text("")
    assert "corpus.jsonl: is empty" in error(folder)
    (folder / "queries.jsonl").write_bytes(b'{"_id": "q", "text": "\xff"}')
    assert "is empty" in error(folder)
    (folder / "corpus.jsonl").write_bytes(b'{"_id": "q", "text": "\xff"}')
    assert "not UTF-8" in error(folder)
    (folder / "queries.jsonl").unlink()
    assert "queries.jsonl is missing" in error(folder)


def test_unknown_names(tmp_path: Path):
    assert "stdlib:dev or stdlib:test" in error("stdlib:train")
    assert "no such folder" in error(tmp_path / "nothing")
    assert "did you mean SciFact" in error("Scifact")
    assert "did you mean NanoBEIR" in error("NanoBIER")
    assert "not of text alone" in error("CIFAR10ZeroShot")
    assert "no folder; write NAME=FOLDER" in error(f"SciFact={tmp_path / 'nothing'}")
    assert "did you mean msmarco" in error("mmarco")
    assert error("quick:elsewhere") == "suite quick:elsewhere: no such folder; name a folder with corpus.jsonl, " + (
        "queries.jsonl and qrels/"
    )


def test_stdlib_reads_code():
    (dev,) = load_suite("stdlib:dev")
    (test,) = load_suite("stdlib:test")
    assert dev.code and test.code
    assert dev.collection.documents == test.collection.documents
    assert not dev.collection.queries.keys() & test.collection.queries.keys()


def test_hub_that_cannot_be_reached_is_one_line():
    message = error("SciFact")  # the tests run with the hub switched off
    assert message.startswith("suite SciFact: mteb/scifact cannot be loaded")
    assert message.endswith("give a folder")


def test_mteb_task_with_subsets_candidates_and_instructions(monkeypatch):
    """A task as mteb loads it from the hub, with the data put in by hand."""
    task = mteb.get_task("BrightRetrieval", hf_subsets=["biology", "pony"])
    data = {
        "corpus": Dataset.from_list([{"id": "a", "title": "T", "text": "x "}, {"id": "b", "title": "", "text": "y"}]),
        "queries": Dataset.from_list([{"id": i, "text": f"t{i}", "instruction": "do"} for i in ("1", "2")]),
        "relevant_docs": {"1": {"a": 1}},
        "top_ranked": {"1": ["b"]},
    }
    monkeypatch.setattr(type(task), "load_data", lambda self, **_: setattr(
        self, "dataset", {subset: {"standard": dict(data)} for subset in self.hf_subsets}))  # fmt: skip
    monkeypatch.setattr("mteb.get_task", lambda name: task)
    biology, pony = load_suite("BrightRetrieval")
    assert biology.collection == (
        "BrightRetrieval:biology", {"a": "T x", "b": "y"}, {"1": "t1 do"}, {"1": {"a": 1}}
    )  # fmt: skip
    assert pony.collection.name == "BrightRetrieval:pony"
    assert (pony.task_name, pony.subset, pony.split) == ("BrightRetrieval", "pony", "standard")
    assert (pony.main_score, pony.candidates, pony.languages) == ("ndcg_at_10", {"1": ["b"]}, ["eng-Latn"])


def members(name: str, monkeypatch) -> dict[str, dict[str, list[str]]]:
    """Group -> member -> tasks of a name, without their data."""
    monkeypatch.setattr("eval.mteb_tasks.load_task", lambda task, folder: [MtebTask(task, task.metadata.name)])
    found: dict[str, dict[str, list[str]]] = {}
    for task in load_suite(name):
        assert isinstance(task, MtebTask)
        found.setdefault(task.group, {}).setdefault(task.member, []).append(task.name)
    return found


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("beir", {"BEIR": (15, 26)}),  # one is an aggregate of 12
        ("BEIR", {"BEIR": (15, 26)}),
        ("coir", {"CoIR": (10, 10)}),
        ("bright", {"BRIGHT": (12, 12), "BRIGHT long": (8, 8)}),
        ("BRIGHT(v1.1)", {"BRIGHT(v1.1)": (20, 20)}),
        ("NanoBEIR", {"NanoBEIR": (13, 13)}),
        ("stage", {"NanoBEIR": (13, 13), "": (2, 2)}),
        ("msmarco", {"": (3, 3)}),
        ("CQADupstackRetrieval", {"CQADupstackRetrieval": (12, 12)}),
        ("SciFact", {"": (1, 1)}),
        ("Banking77Classification", {"": (1, 1)}),
    ],
)
def test_names_and_their_groups(name: str, groups: dict[str, tuple[int, int]], monkeypatch):
    found = members(name, monkeypatch)
    counts = {group: (len(parts), sum(map(len, parts.values()))) for group, parts in found.items()}
    assert counts == groups


def test_our_lists_are_those_of_mteb(monkeypatch):
    for ours, theirs in (("beir", "BEIR"), ("coir", "CoIR"), ("bright", "BRIGHT(v1.1)"), ("stage", "NanoBEIR")):
        listed = {task for group in SUITES[ours] if group.name for task in group.tasks}
        assert listed == {task.metadata.name for task in mteb.get_benchmark(theirs).tasks}
    for group in SUITES["bright"]:
        assert len({mteb.get_task(task).metadata.main_score for task in group.tasks}) == 1
    assert members("msmarco", monkeypatch)[""].keys() == {"MSMARCO", "TRECDL2019", "TRECDL2020"}
    assert {mteb.get_task(task).metadata.type for task in SUITES["stage"][1].tasks} == {"Retrieval"}


def test_a_benchmark_of_several_kinds_is_a_group_for_each(monkeypatch):
    groups = members("MTEB(eng, v2)", monkeypatch)
    assert {name.removeprefix("MTEB(eng, v2) ") for name in groups} == {
        "Classification", "Clustering", "PairClassification", "Reranking", "Retrieval", "STS", "Summarization"
    }  # fmt: skip


def test_what_is_searched_here_and_what_mteb_scores(monkeypatch):
    """Reranking with a score of ours is searched; other kinds, and scores of mteb's own, are mteb's."""
    monkeypatch.setattr("mteb.abstasks.retrieval.AbsTaskRetrieval.load_data", lambda *_, **__: int("read"))
    for name, searched in (
        ("SciFact", True), ("AskUbuntuDupQuestions", True), ("MindSmallReranking", False), ("STSBenchmark", False),
        ("Banking77Classification", False),
    ):  # fmt: skip
        if searched:
            with pytest.raises(RecipeError, match="cannot be loaded"):
                list(load_suite(name))
        else:
            (task,) = load_suite(name)
            assert isinstance(task, MtebTask)


# --------------------------------------------------------------------------- copies on disk


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_folder_in_the_hubs_layout(folder: Path, tmp_path: Path, no_cache):
    hub = write_hub_layout(tmp_path / "hub", folder)
    for split in ("dev", "test"):
        (ours,), (read,) = load_suite(f"{folder}:{split}"), load_suite(f"{hub}:{split}")
        assert read.collection == ours.collection._replace(name=f"hub:{split}")
        assert (read.split, read.group, read.member) == (split, "local", f"hub:{split}")
    (default,) = load_suite(str(hub))
    assert default.split == "test"
    assert f"found {hub}:dev, {hub}:test" in error(f"{hub}:train")
    readme = (hub / "README.md").read_text()
    (hub / "README.md").write_text(readme.replace("config_name: default", "config_name: other"))
    assert error(hub) == f"{hub}/README.md: its configs lack default or qrels; add them"


def test_a_task_from_its_copy_on_disk(folder: Path, tmp_path: Path, no_cache):
    hub = write_hub_layout(tmp_path / "hub", folder)
    (own,) = load_suite(str(folder))
    revisions = set()
    for place in (folder, hub):
        (task,) = load_suite(f"SciFact={place}")
        assert task.collection == own.collection._replace(name="SciFact")
        assert (task.task_name, task.split, task.main_score) == ("SciFact", "test", "ndcg_at_10")
        revisions.add(task.revision)
    (task,) = load_suite(f"ArguAna={folder}")
    assert task.ignore_identical_ids
    corpus = hub / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("w9", "w8", 1))
    (changed,) = load_suite(f"SciFact={hub}")
    assert len(revisions | {changed.revision}) == 3


def test_a_suite_from_copies_on_disk(folder: Path, tmp_path: Path):
    """In folders named as the task, or as the dataset on the hub."""
    mirror = tmp_path / "mirror"
    for name in ("msmarco", "TRECDL2019", "TRECDL2020"):
        write_beir(mirror / name)
    dev, *trec = load_suite(f"msmarco={mirror}")
    assert (dev.split, dev.main_score, dev.reported) == ("dev", "mrr_at_10", ("recall_at_50", "recall_at_1000"))
    assert [(task.collection.name, task.main_score) for task in trec] == [
        ("TRECDL2019", "ndcg_at_10"), ("TRECDL2020", "ndcg_at_10")
    ]  # fmt: skip
    assert "holds no folder TRECCOVID or trec-covid" in error(f"beir={mirror}")


def test_other_kinds_need_the_hubs_layout(folder: Path):
    assert "STSBenchmark is read in the hub's layout" in error(f"STSBenchmark={folder}")


# --------------------------------------------------------------------------- quick, stage, open question answering


def test_quick_and_stage_mean_every_folder_that_is_named(folder: Path, tmp_path: Path):
    other = write_beir(tmp_path / "other")
    named = [str(folder), "SciFact", f"{other}:dev", "stage"]
    assert expand(["quick"], named) == [f"quick:{folder}", f"quick:{other}:dev"]
    assert expand(["stage", "stdlib:dev"], named) == ["stage", str(folder), f"{other}:dev", "stdlib:dev"]
    assert expand(["quick", str(folder)]) == [f"quick:{folder}", str(folder)]
    assert expand([f"quick:{folder}", "SciFact"]) == [f"quick:{folder}", "SciFact"]
    with pytest.raises(RecipeError, match="no local folder is named; write quick:FOLDER"):
        expand(["quick"], ["SciFact"])


def test_a_folder_does_not_hide_a_suite(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_beir(tmp_path / "beir")
    assert error("beir").startswith("suite TRECCOVID: ")  # looked for on the hub
    assert [task.collection.name for task in load_suite("./beir")] == ["beir:test"]
    assert expand(["beir", "stage"]) == ["beir", "stage"] and expand(["./beir", "quick"])[1:] == ["quick:./beir"]
    assert not data_state(["beir"])["beir"] and data_state(["./beir"])["./beir"]


def test_the_state_of_the_data_is_that_of_the_folder_that_is_read(folder: Path):
    odd = write_beir(folder.with_name("a=b"))
    for place in (folder, odd):
        suites = [f"{how}{place}{split}" for how in ("", "quick:") for split in ("", ":dev")]
        states = data_state([*suites, f"SciFact={place}"])
        assert len(states) == 5 and all(len(state) == 4 for state in states.values())
    assert data_state(["stdlib:dev", "SciFact"]) == {"stdlib:dev": [], "SciFact": []}


def test_quick_keeps_what_is_relevant(tmp_path: Path):
    (whole,) = load_suite(str(write_beir(tmp_path / "large", num_documents=2500, num_queries=30)))
    (cut,) = load_suite(f"quick:{tmp_path / 'large'}")
    name, documents, queries, qrels = cut.collection
    assert (name, cut.group, len(documents)) == ("quick:large:test", "quick", 2000)
    assert queries == whole.collection.queries and qrels == whole.collection.qrels
    relevant = {d for grades in qrels.values() for d, grade in grades.items() if grade > 0}
    assert relevant <= documents.keys()
    assert list(documents) == [d for d in whole.collection.documents if d in documents]
    assert {f"d{i}" for i in range(2000)} != documents.keys()  # drawn, not the first ones
    (again,) = load_suite(f"quick:{tmp_path / 'large'}")
    assert again.revision == cut.revision != whole.revision


def test_more_relevant_documents_than_fit_take_queries_away(folder: Path):
    (whole,) = load_suite(str(folder))
    cut = shrink(whole, limit=7).collection
    assert len(cut.documents) == 7 and len(cut.queries) == 3  # two relevant documents a query
    for grades in cut.qrels.values():
        assert {d for d, grade in grades.items() if grade > 0} <= cut.documents.keys()
    with pytest.raises(RecipeError, match="a query has more than 1 relevant"):
        shrink(whole, limit=1)


def test_open_question_answering(tmp_path: Path):
    passages = [("Berlin", "is a city"), ("", "Paris is in France"), ("River", "the Spree")]
    questions = [("where?", ["Berlin", "France"]), ("which river?", ["spree"])]
    folder = write_questions(tmp_path / "qa", passages, questions)
    (task,) = load_suite(str(folder))
    assert task.collection.name == "qa" and task.main_score == "accuracy_at_20"
    assert task.answers == {"q0": ["Berlin", "France"], "q1": ["spree"]}
    bodies = [text[start:] for text, start in zip(task.collection.documents.values(), task.body_starts, strict=True)]
    assert bodies == ["is a city", "Paris is in France", "the Spree"]
    cut = shrink(task, limit=2)
    assert len(cut.collection.documents) == len(cut.body_starts) == 2 and cut.answers == task.answers
    write_questions(tmp_path / "other", passages, [("where?", ["Rome"]), ("which river?", ["spree"])])
    (other,) = load_suite(str(tmp_path / "other"))
    assert other.revision != task.revision
    write_questions(tmp_path / "none", passages, [("where?", []), ("which river?", ["spree"])])
    assert "question 'q0' has no answers" in error(tmp_path / "none")
    (tmp_path / "none" / "queries.jsonl").write_text('{"_id": "q", "text": "?", "answers": "Rome"}\n')
    assert "line 1: answers is no list of texts" in error(tmp_path / "none")
    (tmp_path / "none" / "queries.jsonl").write_text('{"_id": "q", "text": "?"}\n')
    assert "qrels is missing" in error(tmp_path / "none")
