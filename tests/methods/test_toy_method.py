"""A method is one folder and one row: the files of docs/adding_a_method.md, put beside our methods and trained.

What the page says is printed, and the files themselves, are taken from the page.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from beir import write_beir
from distributed import REPOSITORY, WORKERS, pooled
from in_process import start
from recipe_changes import problems
from safetensors.torch import load_file
from tiny import build_objective, save_model, without_dropout, wordpiece_tokenizer
from torch import Tensor

from toolkit import methods
from toolkit.data.tokens import Tokens
from toolkit.methods.objective import Objective
from toolkit.recipe.schema import stage_type

PAGE = (REPOSITORY / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
FILE = re.compile(r"^`([\w./]+)`[^\n]*\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAME, PACKAGE = "continuation", "toolkit.methods.continuation"
WORDS = ["tide", "boat", "harbour", "wind", "rope", "sail", "captain", "lamp", "stone", "bridge", "river", "mill"]
TEXTS = [
    "The tide rises twice a day. Boats wait for it.",
    "A lamp burns.",
    "Ropes are dried in the wind before the market opens.",
    "The mill stands still in summer, when the river is low.",
    "Bells ring at noon and at six.",
    "Stone by stone the bridge was carried off to build a tower.",
]


class Toy(NamedTuple):
    """Where the method, its recipe, and the model, documents and collection of the recipe lie."""

    folder: Path
    recipe: dict[str, Any]


def printed(what: str) -> list[str]:
    """The lines that the page shows of an output, which a comment in it names."""
    found = re.search(rf"<!-- {what} -->\n```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found, what
    return found.group(1).splitlines()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    """The method in the table, its folder one that `toolkit.methods` is searched in too."""
    folder = tmp_path_factory.mktemp("toy")
    for name, text in FILE.findall(PAGE):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    without_dropout(save_model(folder / "my_model", "bert"))
    write_beir(folder / "my_collection")
    _write_documents(folder / "my_documents")
    recipe = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))
    stage = recipe["stages"][0]
    stage["start"]["folder"] = str(folder / stage["start"]["folder"])
    stage["data"]["sources"][0]["folder"] = str(folder / stage["data"]["sources"][0]["folder"])
    stage["eval"]["suites"] = [str(folder / suite) for suite in stage["eval"]["suites"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
        patch.setitem(methods.TABLE, NAME, PACKAGE)
        yield Toy(folder, recipe)
    for module in [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]:
        del sys.modules[module]


def _write_documents(folder: Path) -> None:
    """12 documents of 6 passages each at 12 words; the first begins as the page's example."""
    folder.mkdir()
    lines = []
    for i in range(12):
        sentences = [f"The {WORDS[(i + j) % 12]} stays with {WORDS[(5 * i + j) % 12]} {j} of {i}." for j in range(6)]
        lines.append(json.dumps({"text": " ".join([TEXTS[0], *sentences[:5]] if i == 0 else sentences)}))
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------- recipe and dry run


def test_the_files_of_the_page_keep_the_style(toy: Toy) -> None:
    assert sorted(path.name for path in (toy.folder / NAME).glob("*.py")) == [
        "__init__.py", "keys.py", "method.py", "objective.py", "rows.py",
    ]  # fmt: skip
    ruff = [str(Path(sys.executable).parent / "ruff")]
    ours = 'lint.isort.known-first-party=["toolkit"]'  # ruff looks for the folder where the toolkit is
    options = ["--config", str(REPOSITORY / "pyproject.toml"), "--no-cache", str(toy.folder / NAME)]
    for command in (["check", "--config", ours], ["format", "--check"]):
        done = subprocess.run([*ruff, *command, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dry_run_prints_what_the_page_says(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, toy.recipe, monkeypatch, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in printed("dry run") if line not in lines] == []
    assert lines[0] == f"data: {toy.folder / 'my_documents'}: text = text"


def test_mistakes_in_its_sections_are_told_as_the_page_says(toy: Toy, tmp_path: Path) -> None:
    stage = toy.recipe["stages"][0]
    own = stage | {"objective": {"name": NAME, "temprature": 0.05}}
    others = stage | {"data": stage["data"] | {"positives": 1}}
    cut = stage | {"data": stage["data"] | {"passages": {"unit": "sentences", "max_words": 1}}}
    found = [problems(tmp_path, toy.recipe | {"stages": [each]}) for each in (own, others, cut)]
    assert found == [[line] for line in printed("mistakes")]


def test_a_method_that_is_not_in_the_table_is_unknown(toy: Toy, tmp_path: Path) -> None:
    stage = toy.recipe["stages"][0]
    wrong = stage | {"objective": {"name": "continuations", "temperature": 0.05}}
    line = "stages.0.objective.name: 'continuations' is unknown; did you mean continuation?"
    assert problems(tmp_path, toy.recipe | {"stages": [wrong]}) == [line]


# --------------------------------------------------------------------------- the loss


def built(toy: Toy, **batch: Any) -> tuple[Objective, Any]:
    """The objective in fp64, and a pool of passages of uneven lengths."""
    raw = toy.recipe["stages"][0] | {"batch": toy.recipe["stages"][0]["batch"] | batch}
    stage = stage_type(NAME).model_validate_json(json.dumps(raw))
    objective = build_objective(stage, 3, "cpu", toy.folder / "my_model").double()
    objective.eval()  # no dropout
    from toolkit.methods.continuation.rows import collate_continuation  # pyright: ignore[reportMissingImports]

    settings = {"tokenizer": wordpiece_tokenizer(), "encoder": stage.encoder_settings, "beginning": 0.5}
    return objective, collate_continuation(TEXTS, torch.arange(len(TEXTS)).numpy(), **settings)


def plain_loss(objective: Any, batch: Any, swapped: bool = False, constant: bool = False) -> Tensor:
    """The equation of the page, one text at a time and without padding.

    Controls: `swapped`, a continuation finds its beginning; `constant`, no gradient goes through the continuations.
    """

    def vectors(side: Tokens) -> Tensor:
        texts = [ids[mask.bool()][None] for ids, mask in zip(*side, strict=True)]
        return torch.cat([objective.encoder(Tokens(ids, torch.ones_like(ids))) for ids in texts])

    query, passage = vectors(batch.query), vectors(batch.passage)
    passage = passage.detach() if constant else passage
    weights = (query @ passage.T / 0.05).exp()
    weights = weights.T if swapped else weights
    return -(weights.diagonal() / weights.sum(1)).log().mean()


def gradient(objective: Objective, loss: Tensor) -> Tensor:
    objective.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])


def gap(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("slices", [{"forward_rows": None}, {"forward_rows": 4}, {"forward_tokens": 50}], ids=str)
def test_loss_and_gradient_are_those_of_the_plain_form(toy: Toy, slices: dict[str, Any]) -> None:
    objective, batch = built(toy, **({"forward_rows": None} | slices))
    loss = objective(batch).total
    found, expected = gradient(objective, loss), plain_loss(objective, batch)
    assert gap(loss, expected) < 1e-12
    assert gap(found, gradient(objective, expected)) < 1e-12
    swapped, constant = plain_loss(objective, batch, swapped=True), plain_loss(objective, batch, constant=True)
    assert gap(loss, swapped) > 1e-4  # control of the value
    assert gap(loss, constant) < 1e-12 and gap(found, gradient(objective, constant)) > 1e-2  # and of the gradient


# --------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def trained(toy: Toy) -> tuple[Path, str]:
    """The run folder of a run on two ranks, and what it printed."""
    path, run = toy.folder / "ranks.json", toy.folder / "run"
    path.write_text(json.dumps(toy.recipe))
    done = pooled(WORKERS / "toy_method.py", 2, str(path), "--output", str(run), METHODS=str(toy.folder))
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return run, done.stdout


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def masked(line: str) -> str:
    """A line without its numbers and the width of its columns."""
    return re.sub(r"\s+", " ", re.sub(r"\d[\w.,]*(?:[e+]\w+)?|(?<=digest )\w+", "#", line)).strip()


def test_training_prints_what_the_page_says(trained: tuple[Path, str]) -> None:
    _, said = trained
    lines = {masked(line) for line in said.splitlines()}
    assert [line for line in printed("training") if masked(line) not in lines] == []


def test_the_log_has_its_scalars_and_costs(toy: Toy, trained: tuple[Path, str]) -> None:
    run, _ = trained
    steps = logged(run)
    assert [line["step"] for line in steps] == [1, 2]
    weights = load_file(toy.folder / "my_model" / "model.safetensors")
    matrices = [w for name, w in weights.items() if w.ndim == 2 and not name.startswith(("embeddings", "pooler"))]
    a_token = (2 + 2 + 2 + 2) * sum(w.numel() for w in matrices)  # forward, twice backward, forward again in slices
    for line in steps:
        assert line["loss"] > 0 and line["grad_norm"] > 0 and 0 <= line["accuracy"] <= 1 and 0 < line["padding"] < 1
        assert line["tokens"] == line["tokens_query"] + line["tokens_passage"] > 0
        assert line["flops"] == a_token * line["tokens"]


def test_the_export_has_a_card_with_scores_and_the_report_names_the_stage(trained: tuple[Path, str]) -> None:
    run, _ = trained
    folder = run / "stage_0_continue"
    card = (folder / "export" / "README.md").read_text(encoding="utf-8")
    assert "| Method | InfoNCE between the beginning of a passage and what follows it |" in card
    assert '- "continuation"' in card
    scores = json.loads((folder / "done.json").read_text())["scores"]
    (suite, row), *_ = scores.items()
    assert f"| {suite} | this model | {next(iter(row.values())):.4f} |" in card
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "0 continue" in report and f"{next(iter(row.values())):.4f}" in report


def test_one_rank_trains_as_two(
    toy: Toy, trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = toy.recipe["stages"][0] | {"eval": {"suites": []}}
    assert start(tmp_path, toy.recipe | {"stages": [stage]}, monkeypatch) == 0
    for alone, together in zip(logged(tmp_path / "run"), logged(trained[0]), strict=True):
        assert alone["rows"] == together["rows"] and alone["tokens"] == together["tokens"]
        assert alone["loss"] == pytest.approx(together["loss"], rel=1e-5)
        assert alone["grad_norm"] == pytest.approx(together["grad_norm"], rel=1e-4)
