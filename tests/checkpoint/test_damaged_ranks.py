"""Two ranks: a file of any rank's that was altered is named, and a save that fails on one rank ends on both."""

from pathlib import Path
from typing import Any

import pytest
from distributed import run_on_ranks
from tiny import save_model

KEPT, NEWEST = "step_00000001", "step_00000002"
FILES = {"manifest_00000.json", "manifest_00001.json", "objective.safetensors", "run_state.json"}
FILES |= {"weights_00000_000.safetensors", "weights_00001_000.safetensors"}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root: Path = tmp_path_factory.mktemp("damaged")
    request = {"folder": str(save_model(root / "llama", "llama")), "checkpoints": str(root / "checkpoints")}
    return root, run_on_ranks("damaged_ranks.py", 2, request, root)


def test_a_whole_checkpoint_is_used(asked: tuple[Path, dict[str, Any]]) -> None:
    assert asked[1]["whole"] == {"steps": [2, 2], "said": "", "left": [KEPT, NEWEST]}


def test_an_altered_file_of_any_rank_is_named(asked: tuple[Path, dict[str, Any]]) -> None:
    """Queue and momentum encoder are in objective.safetensors."""
    root, answer = asked
    assert answer["damaged"].keys() == FILES
    for file, got in answer["damaged"].items():
        assert got["steps"] == [1, 1] and got["left"] == [f"damaged_{NEWEST}", KEPT], (file, got)
        assert got["said"].startswith(f"{root}/checkpoints_copy/{NEWEST}"), (file, got)
        assert got["said"].endswith(f"; it is now damaged_{NEWEST}, and {KEPT} is used\n"), (file, got)
        if file.endswith(".safetensors"):
            assert f"{NEWEST}/{file}: is not what was written (sha256)" in got["said"], (file, got)


def test_a_save_that_fails_on_one_rank_ends_on_both(asked: tuple[Path, dict[str, Any]]) -> None:
    root, answer = asked
    assert answer["failing"].keys() == {"_save", "_seal", "_open", "_place"}
    for name, got in answer["failing"].items():
        first, second = got["raised"]
        said = f"{root}/checkpoints_copy: the checkpoint cannot be written ([Errno 28] No space left on device); "
        assert first == second and first.startswith(said), (name, got)
        assert got["steps"] == [2, 2] and got["left"] == [KEPT, NEWEST], (name, got)
