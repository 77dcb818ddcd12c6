"""What a stage's models hold: the same on all nodes, and in a resumed run what it began with. Called by training."""

import hashlib
import json
import socket
from collections import Counter
from pathlib import Path

from toolkit.collectives import gather_texts, rank
from toolkit.files import sha256
from toolkit.models.formats import ADAPTER_CONFIG
from toolkit.models.places import ModelSource
from toolkit.prepare.models import tokenizer_digest
from toolkit.ranks.together import on_every_rank
from toolkit.recipe.errors import RecipeError


def model_digests(sources: list[ModelSource]) -> list[str]:
    """16 hex digits of each model's weights and configs, adapter included. Called on all ranks.

    Every byte is read once on each host: its ranks share the files.

    Raises:
        RecipeError: on all ranks, if a file cannot be read, or if hosts have not the same ones.
    """
    hosts = gather_texts(socket.gethostname())
    here = [number for number, host in enumerate(hosts) if host == hosts[rank()]]
    files = [(f"{number} {name}", path) for number, source in enumerate(sources) for name, path in _files(source)]
    own = files[here.index(rank()) :: len(here)]
    found: dict[str, dict[str, str]] = {}
    for host, text in zip(hosts, gather_texts(json.dumps(on_every_rank(lambda: _hashes(own)))), strict=True):
        found.setdefault(host, {}).update(json.loads(text))
    _check_same(found, [source.name for source in sources])
    hashes = sorted(found[hosts[0]].items())
    parts = [[pair for pair in hashes if pair[0].startswith(f"{number} ")] for number in range(len(sources))]
    return [hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for part in parts]


def _files(source: ModelSource) -> list[tuple[str, Path]]:
    """Files that a model is made of, by names that a base and its adapter do not share."""
    adapter = [] if source.adapter is None else [("adapter/", path) for path in sorted(source.adapter.iterdir())]
    files = [("", path) for path in sorted(source.folder.iterdir())] + adapter
    names = ("config.json", ADAPTER_CONFIG)
    return [(at + path.name, path) for at, path in files if path.suffix == ".safetensors" or path.name in names]


def _hashes(files: list[tuple[str, Path]]) -> dict[str, str]:
    return {name: sha256(path) for name, path in files}


def _check_same(found: dict[str, dict[str, str]], names: list[str]) -> None:
    """RecipeError if a host's files are not those of most."""
    usual = Counter(json.dumps(files, sort_keys=True) for files in found.values()).most_common(1)[0][0]
    for host, files in found.items():
        expected = json.loads(usual)
        other = sorted(name for name in files | expected if files.get(name) != expected.get(name))
        if other:
            number, file = other[0].split(" ", 1)
            raise RecipeError(
                f"{names[int(number)]}: {file} on {host} is not that of the other hosts; put the model on a disk that "
                "all nodes share, or copy it anew to each"
            )


def tokenizer_digests(sources: list[ModelSource]) -> list[str]:
    """tokenizer_digest of each model. Called on all ranks.

    Raises:
        RecipeError: on all ranks, if a rank's are not those of rank 0.
    """
    own = [tokenizer_digest(source.folder) for source in sources]
    everyone = [json.loads(text) for text in gather_texts(json.dumps([socket.gethostname(), own]))]
    for number, (host, digests) in enumerate(everyone):
        for source, digest, expected in zip(sources, digests, everyone[0][1], strict=True):
            if digest != expected:
                raise RecipeError(
                    f"{source.name}: the tokenizer of rank {number} ({host}) is not that of rank 0 "
                    f"({everyone[0][0]}); put the model on a disk that all nodes share, or copy it anew to each"
                )
    return own
