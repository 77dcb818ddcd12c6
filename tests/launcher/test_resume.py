"""Going on: what a resumed run accepts, what it refuses, and how stages follow one another (one process)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from recipe_changes import changed
from safetensors.numpy import load_file
from test_errors import one_stage, start

STAGE = "stage_0_language_model"


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A finished language_model stage of two steps, a checkpoint each; its recipe."""
    recipe = one_stage(tmp_path, ("stages.0.optim.steps", 2), ("stages.0.save", {"every": 1, "keep": 2}))
    assert start(tmp_path, recipe, monkeypatch) == 0
    return recipe


def unfinish(run: Path) -> Path:
    """As if the run had ended after its last checkpoint; returns that checkpoint."""
    (run / STAGE / "done.json").unlink()
    shutil.rmtree(run / STAGE / "export")
    return run / STAGE / "checkpoints" / "step_00000002"


def test_a_checkpoint_of_another_number_of_ranks_is_refused(trained, tmp_path, monkeypatch, capsys) -> None:
    path = unfinish(tmp_path / "run") / "run_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"world_size": 4}))
    assert start(tmp_path, trained, monkeypatch) == 2
    assert "was written by 4 ranks, this run has 1; start with 4 again" in capsys.readouterr().err


def test_a_cut_checkpoint_is_named_and_the_one_before_still_works(trained, tmp_path, monkeypatch, capsys) -> None:
    newest = unfinish(tmp_path / "run")
    victim = max((newest / "engine").glob("*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-100])
    assert start(tmp_path, trained, monkeypatch) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"{victim}: is cut short; delete this checkpoint to go on from the one before"
    shutil.rmtree(newest)
    assert start(tmp_path, trained, monkeypatch) == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()] == [1, 2]


def test_stages_that_have_not_begun_may_change(trained, tmp_path, monkeypatch, capsys) -> None:
    """A later stage is corrected, and a second Revela stage continues the adapter of the first."""
    full = changed(("stages.0.data", trained["stages"][0]["data"]))
    second = full["stages"][1] | {"data": trained["stages"][0]["data"]}
    second["optim"]["steps"] = 2
    both = trained | {"stages": [trained["stages"][0], json.loads(json.dumps(second))]}
    both["stages"][1]["lora"]["targets"] = ["q_projection"]
    assert start(tmp_path, both, monkeypatch) == 2 and "q_projection match no module" in capsys.readouterr().err
    both["stages"][1] = second
    assert start(tmp_path, both, monkeypatch) == 0
    third = json.loads(json.dumps(second)) | {"name": "revela_again"}
    third["objective"]["language_model"]["start"] = {"folder": str(tmp_path / "run" / STAGE / "export" / "lm")}
    assert start(tmp_path, both | {"stages": [*both["stages"], third]}, monkeypatch) == 0
    exports = [tmp_path / "run" / name / "export" for name in ("stage_1_revela", "stage_2_revela_again")]
    bases = [json.loads((export / "adapter_config.json").read_text())["base_model_name_or_path"] for export in exports]
    assert bases[0] == bases[1] == str(tmp_path / "run" / STAGE / "export")
    first, again = (load_file(export / "adapter_model.safetensors") for export in exports)
    steps = {name: abs(again[name] - first[name]).max() for name in first}
    assert all(0 < step < 0.01 for step in steps.values()), steps  # moved on from the first adapter, not from a new one


def test_a_finished_run_only_reports(trained, tmp_path, monkeypatch) -> None:
    weights = tmp_path / "run" / STAGE / "export" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert start(tmp_path, trained, monkeypatch) == 0 and weights.stat().st_mtime_ns == before
