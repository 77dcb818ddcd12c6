"""Files that are written whole: their modes are those of any new file, whatever library wrote them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import save_model
from tiny_retriever import CASES, make

from toolkit.checkpoint import states as checkpoint
from toolkit.files import placing_folder, replacing_folder


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    return {path.stat().st_mode & 0o777 for path in files}


@pytest.mark.parametrize("name", ["llama_lora", "llama_full"])
def test_an_export_has_the_modes_of_the_umask(name: str, umask: int, tmp_path: Path) -> None:
    folder = make(CASES[name], tmp_path / "base").write(tmp_path / "export", merged=name == "llama_lora")
    assert modes(folder) == {0o666 & ~umask}


@pytest.mark.parametrize("writing", [replacing_folder, placing_folder])
def test_a_folder_of_prepared_files_has_the_modes_of_the_umask(writing, umask: int, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.touch(mode=0o400)
    with writing(tmp_path / "made") as work:
        save_model(work / "model", "llama")
        (work / "link").symlink_to(outside)
    assert (tmp_path / "made" / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert outside.stat().st_mode & 0o777 == 0o400  # what a link names is not ours


def test_a_checkpoint_has_the_modes_of_the_umask(umask: int, tmp_path: Path) -> None:
    (tmp_path / "aside").mkdir()
    path = checkpoint._save(tmp_path / "aside" / "weights_00000_000.safetensors", {"a": torch.ones(3)})
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
