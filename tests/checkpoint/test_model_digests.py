"""What a stage's models hold is read once a host, and compared between hosts."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from tiny import save_model

from toolkit.checkpoint import model_digests as module
from toolkit.checkpoint.model_digests import model_digests, tokenizer_digests
from toolkit.prepare.models import ModelSource
from toolkit.recipe.errors import RecipeError


@pytest.fixture
def sources(tmp_path: Path) -> list[ModelSource]:
    folders = [save_model(tmp_path / name, "bert", seed) for seed, name in enumerate("ab")]
    return [ModelSource(folder, f"org/{folder.name}") for folder in folders]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_every_byte_of_weights_and_config_counts(sources: list[ModelSource], tmp_path: Path) -> None:
    first = model_digests(sources)
    assert len(first) == 2 and first[0] != first[1] and model_digests(sources) == first
    flip(sources[1].folder / "model.safetensors")
    second = model_digests(sources)
    assert second[0] == first[0] and second[1] != first[1]
    (sources[0].folder / "README.md").write_text("nothing that is loaded")
    assert model_digests(sources) == second
    adapter, seen = tmp_path / "adapter", {first[0]}
    adapter.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "config.json"):
        (adapter / name).write_text(f"{name} of the adapter, here")
    adapted = [sources[0]._replace(adapter=adapter)]
    files = [adapter / "adapter_model.safetensors", adapter / "adapter_config.json", adapted[0].folder / "config.json"]
    for changed in files:
        seen |= set(model_digests(adapted))
        flip(changed)
    assert len(seen | set(model_digests(adapted))) == 5


def ranks(monkeypatch: pytest.MonkeyPatch, hosts: list[str], rank: int, others: Any) -> list[str]:
    """This process is one of several ranks; `others`: a text -> the texts of all. Returns what this rank gave."""
    gave: list[str] = []

    def gather(text: str) -> list[str]:
        gave.append(text)
        return hosts if text == socket.gethostname() else others(text)

    monkeypatch.setattr(module, "gather_texts", gather)
    monkeypatch.setattr(module, "rank", lambda: rank)
    return gave


def test_ranks_of_a_host_share_the_files(sources: list[ModelSource], monkeypatch: pytest.MonkeyPatch) -> None:
    alone, parts = model_digests(sources), []
    for rank in range(2):
        gave = ranks(monkeypatch, ["a", "a"], rank, lambda text: [text, "{}"])
        model_digests(sources)
        parts.append(json.loads(gave[1]))
    assert all(parts) and not parts[0].keys() & parts[1].keys()
    ranks(monkeypatch, ["a", "a"], 0, lambda text: [json.dumps(part) for part in parts])
    assert model_digests(sources) == alone


def test_the_odd_host_is_named(sources: list[ModelSource], monkeypatch: pytest.MonkeyPatch) -> None:
    def others(text: str) -> list[str]:
        odd = json.loads(text) | {"1 model.safetensors": "0" * 64}
        return [text, json.dumps(odd), text]

    ranks(monkeypatch, ["node1", "node2", "node3"], 0, others)
    fix = "put the model on a disk that all nodes share, or copy it anew to each"
    with pytest.raises(RecipeError) as raised:
        model_digests(sources)
    assert str(raised.value) == f"org/b: model.safetensors on node2 is not that of the other hosts; {fix}"
    ranks(monkeypatch, ["node1", "node2"], 0, lambda text: [text, json.dumps(["node2", ["0", "0"]])])
    with pytest.raises(RecipeError) as raised:
        tokenizer_digests(sources)
    here = socket.gethostname()
    assert str(raised.value) == f"org/a: the tokenizer of rank 1 (node2) is not that of rank 0 ({here}); {fix}"
