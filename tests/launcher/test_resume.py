"""Going on: what a resumed run accepts, what it refuses, and how stages follow one another (one process)."""

import fcntl
import json
import os
import resource
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import files_below, one_stage, start
from recipe_changes import changed
from safetensors.numpy import load_file

from toolkit.checkpoint import states as checkpoint
from toolkit.methods.language_model.objective import LanguageModel
from toolkit.methods.objective import Loss
from toolkit.ranks import lock
from toolkit.training import loop

STAGE = "stage_0_language_model"
KEPT = ("loss", "grad_norm", "lr", "rows")  # what the log of a resumed run must repeat


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A finished language_model stage of two steps, a checkpoint each; its recipe."""
    recipe = one_stage(tmp_path, ("stages.0.optim.steps", 2), ("stages.0.save", {"every": 1, "keep": 2}))
    assert start(tmp_path, recipe, monkeypatch) == 0
    return recipe


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def unfinish(run: Path) -> Path:
    """As if the run had ended after its last checkpoint; returns that checkpoint."""
    (run / STAGE / "done.json").unlink()
    shutil.rmtree(run / STAGE / "export")
    return run / STAGE / "checkpoints" / "step_00000002"


def test_a_checkpoint_of_other_data_or_another_tokenizer_is_refused(trained, tmp_path, monkeypatch, capsys) -> None:
    """A new file makes another tokenizer and other passages: the old weights would read ids that mean other words."""

    def refused() -> str:
        assert start(tmp_path, trained, monkeypatch) == 2
        assert files_below(tmp_path / "run" / STAGE) == before
        return capsys.readouterr().err.strip().splitlines()[-1].removeprefix(f"{newest}: ")

    newest = unfinish(tmp_path / "run")
    before = files_below(tmp_path / "run" / STAGE)
    (tokenizer,) = (tmp_path / "run" / "prepared").glob("start_*/tokenizer_config.json")
    added, whole = tmp_path / "data" / "more.jsonl", tokenizer.read_text()
    added.write_text(json.dumps({"text": "class Added:\n    pass"}) + "\n")
    error = refused()
    assert error.startswith("the data changed since (digest ")
    assert error.endswith("); put the data back, or choose another --output")
    added.unlink()
    tokenizer.write_text(json.dumps(json.loads(whole) | {"padding_side": "left"}))
    error = refused()
    assert error.startswith("the tokenizer changed since (digest ")
    assert error.endswith("); put its files back, or choose another --output")
    tokenizer.write_text(whole)
    weights = tokenizer.with_name("model.safetensors")
    whole_weights = weights.read_bytes()
    alter(weights)
    error = refused()
    assert error.startswith("the model that the stage starts from changed since (digest ")
    assert error.endswith("); put its files back, or choose another --output")
    weights.write_bytes(whole_weights)
    assert start(tmp_path, trained, monkeypatch) == 0


def cut(path: Path) -> str:
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    return f"{path}: has {size - 100:,} bytes, {size:,} were written"


def remove(path: Path) -> str:
    path.unlink()
    return f"{path}: is missing"


def alter(path: Path) -> str:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return f"{path}: is not what was written (sha256)"


def alter_manifest(path: Path) -> str:
    """JSON of another shape."""
    path.with_name("manifest_00000.json").write_text(json.dumps({path.name: 7}))
    return f"{path.parent}: its description cannot be read (cannot unpack non-iterable int object)"


def forget_in_manifest(path: Path) -> str:
    manifest = path.with_name("manifest_00000.json")
    listed = json.loads(manifest.read_text())
    del listed[path.name]
    manifest.write_text(json.dumps(listed))
    return f"{path}: is in no file manifest_*.json"


@pytest.mark.parametrize("harm", [cut, remove, alter, alter_manifest, forget_in_manifest])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(harm, trained, tmp_path, monkeypatch, capsys) -> None:
    export = tmp_path / "run" / STAGE / "export" / "model.safetensors"
    weights, before = load_file(export), log(tmp_path / "run")
    newest = unfinish(tmp_path / "run")
    file, events = tmp_path / "run" / "log.jsonl", list((tmp_path / "run" / "tensorboard").iterdir())
    inode, content = file.stat().st_ino, [path.read_bytes() for path in events]
    said = harm(max(newest.glob("weights_*.safetensors")))
    capsys.readouterr()
    assert start(tmp_path, trained, monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{said}; it is now damaged_step_00000002, and step_00000001 is used" in lines
    assert sorted(p.name for p in newest.parent.iterdir()) == ["damaged_step_00000002", "step_00000001", newest.name]
    assert file.stat().st_ino == inode and [path.read_bytes() for path in events] == content  # not written anew
    after, again = log(tmp_path / "run"), load_file(export)
    assert [row["step"] for row in before] == [row["step"] for row in after] == [1, 2]
    assert all(row[key] == other[key] for row, other in zip(before, after, strict=True) for key in KEPT)
    assert weights.keys() == again.keys() and all(np.array_equal(weights[name], again[name]) for name in weights)


def test_where_every_checkpoint_is_damaged_nothing_is_trained(trained, tmp_path, monkeypatch, capsys) -> None:
    folder = unfinish(tmp_path / "run").parent
    for damaged in folder.iterdir():
        said = remove(damaged / "manifest_00000.json")
    assert start(tmp_path, trained, monkeypatch) == 2
    said = f"{folder / 'step_00000001'}: 0 of 1 files manifest_*.json are there"
    expected = f"{said}; there is no checkpoint before it: delete {folder} to begin the stage anew"
    assert capsys.readouterr().err.strip().splitlines()[-1] == expected


def no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """No file may pass 4 KiB."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*args: Any, **more: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        try:
            return saved(*args, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    saved = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", limited)
    return "File too large"


def no_right(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of another user's folder; root, who may write everywhere, becomes nobody meanwhile."""
    make = checkpoint._open

    def refused(aside: Path) -> None:
        if os.geteuid() != 0:
            folder.chmod(0o555)
            return make(aside)
        os.seteuid(65534)
        try:
            return make(aside)
        finally:
            os.seteuid(0)

    monkeypatch.setattr(checkpoint, "_open", refused)
    return "Permission denied"


def other_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The disk keeps something else than what was written."""
    save = checkpoint.save_file

    def altered(tensors: dict[str, Any], path: Path) -> None:
        save({name: tensor * 2 + 1 for name, tensor in tensors.items()}, path)

    monkeypatch.setattr(checkpoint, "save_file", altered)
    return "weights_00000_000.safetensors does not read back as it was written"


def folder_gone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    shutil.rmtree(folder)
    return "No such file or directory"


@pytest.mark.parametrize("fault", [no_room, no_right, other_bytes, folder_gone])
def test_a_save_that_fails_leaves_the_one_before(fault, tmp_path, monkeypatch, capsys) -> None:
    recipe = one_stage(tmp_path, ("stages.0.optim.steps", 2), ("stages.0.save", {"every": 1, "keep": 1}))
    folder = tmp_path / "run" / STAGE / "checkpoints"
    save, left = loop.save_checkpoint, {}

    def failing(engine: Any, where: Path, state: Any, keep: int) -> None:
        if state.step == 2 and not left:
            files = files_below(folder)
            reason = fault(folder, faulty)
            left.update({name: (folder / name).read_bytes() for name in files if folder.exists()}, reason=reason)
        save(engine, where, state, keep)

    with monkeypatch.context() as faulty:
        faulty.setattr(loop, "save_checkpoint", failing)
        assert start(tmp_path, recipe, monkeypatch) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    reason = left.pop("reason")
    assert error.startswith(f"{folder}: the checkpoint cannot be written (") and reason in error
    assert error.endswith("then start the same command again: it goes on from the checkpoint before")
    assert all((folder / name).read_bytes() == content for name, content in left.items())
    assert bool(left) == (fault is not folder_gone)
    if folder.exists():
        folder.chmod(0o755)
    assert start(tmp_path, recipe, monkeypatch) == 0
    assert f"starts at step {1 if left else 0}" in " ".join(capsys.readouterr().out.split())
    assert [path.name for path in folder.iterdir()] == ["step_00000002"]


def test_a_save_that_was_cut_off_leaves_nothing(trained, tmp_path, monkeypatch) -> None:
    """As after SIGKILL in the middle of it: the run goes on from the one before, and its remains are cleared away."""
    newest = unfinish(tmp_path / "run")
    newest.rename(newest.with_name(".writing_step_00000002"))
    (newest.with_name(".writing_step_00000002") / "manifest_00000.json").unlink()
    assert start(tmp_path, trained, monkeypatch) == 0
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step_00000001", "step_00000002"]


def test_a_run_folder_has_one_run_at_a_time(trained, tmp_path, monkeypatch, capsys) -> None:
    unfinish(tmp_path / "run")
    before = files_below(tmp_path / "run")
    with (tmp_path / "run" / ".lock").open("r") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert start(tmp_path, trained, monkeypatch) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"{tmp_path / 'run'}: is in use by process {os.getpid()} on {socket.gethostname()}; " + (
        "wait for its end, or end it"
    )
    assert files_below(tmp_path / "run") == before
    assert start(tmp_path, trained, monkeypatch) == 0


@pytest.mark.parametrize("freed", [True, False])
def test_a_lock_of_another_machine_is_waited_for(freed: bool, trained, tmp_path, monkeypatch, capsys) -> None:
    """That may have gone down: its file server frees the lock a little later."""
    unfinish(tmp_path / "run")
    (tmp_path / "run" / ".lock").write_text("process 7 on elsewhere\n")
    monkeypatch.setattr(lock, "SECONDS_TO_FREE", 60 if freed else 0.2)
    with (tmp_path / "run" / ".lock").open("r") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        free = threading.Timer(1, fcntl.flock, (other, fcntl.LOCK_UN))
        if freed:
            free.start()
        assert start(tmp_path, trained, monkeypatch) == (0 if freed else 2)
    said = f"{tmp_path / 'run'}: is in use by process 7 on elsewhere"
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(said)]
    assert f"{said}, or was when that machine went down; waits " in lines[0] and len(lines) == (1 if freed else 2)


@pytest.mark.parametrize("rule", ["stop", "skip"])
def test_a_loss_that_is_not_finite_changes_nothing(rule, tmp_path, monkeypatch, capsys) -> None:
    """Its rows are written down, and the run stops or goes on; a stopped one goes on once the recipe says so."""
    recipe = one_stage(tmp_path, ("stages.0.optim.steps", 3), ("stages.0.save", {"every": 1, "keep": 3}))
    guard = recipe["stages"][0]["guard"] = {"non_finite": rule}
    clean, run = tmp_path / "clean", tmp_path / "run"
    assert start(tmp_path, recipe, monkeypatch, "--output", str(clean)) == 0
    forwards, loss = iter(range(100)), LanguageModel.forward  # two a step

    def poisoned(self: LanguageModel, batch: Any) -> Loss:
        found = loss(self, batch)
        return Loss(found.total / (next(forwards) != 2), found.parts)

    with monkeypatch.context() as faulty:
        faulty.setattr(LanguageModel, "forward", poisoned)
        assert start(tmp_path, recipe, monkeypatch) == (2 if rule == "stop" else 0)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    (found,) = [json.loads(line) for line in (run / STAGE / "not_finite.jsonl").read_text().splitlines()]
    assert found["step"] == 2 and found["loss"] == "inf" and np.array(found["pools"]).shape == (2, 4)
    states = run / STAGE / "checkpoints"
    if rule == "stop":
        assert error.startswith("step 2: loss inf, gradient norm ") and "its rows are " in error
        assert error.endswith('or go on without such steps by guard.non_finite = "skip"')
        assert [path.name for path in states.iterdir()] == ["step_00000001"]
        guard["non_finite"] = "skip"
        assert start(tmp_path, recipe, monkeypatch) == 0  # the batch is as it should be, now
        assert [row["skipped_steps"] for row in log(run)] == [0, 0, 0]
        assert [row["loss"] for row in log(run)] == [row["loss"] for row in log(clean)]
        assert (run / STAGE / "not_finite.jsonl").read_text() == ""  # the step was taken again
        return
    assert [row["skipped_steps"] for row in log(run)] == [0, 1, 1] and "loss" not in log(run)[1]
    first, second, third = (load_file(states / f"step_{n:08d}" / "weights_00000_000.safetensors") for n in (1, 2, 3))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert all((second[name] != third[name]).any() for name in first)  # and the next step is taken
    described = json.loads((states / "step_00000003" / "run_state.json").read_text())
    assert (described["step"], described["skipped"], described["adam_steps"]) == (3, 1, 2)


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
