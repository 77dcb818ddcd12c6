"""Proof that an export is the model that was trained: a fresh process loads it and its vectors are compared.

Called by training after write_export (check_export). The fresh process is `python -m toolkit.export.check REQUEST`, or
the module of contextual retrievers, whose class sentence-transformers would not load by itself.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from toolkit.export.write import read_record, write_record

_PLAIN, _CONTEXTUAL = "toolkit.export.check", "toolkit.retrieval.sentence_module"  # what the fresh process runs
KINDS = ("query", "passage")
COSINE_LIMITS = {"bf16": 1e-3, "fp32": 1e-5, "fp64": 1e-5}
NORM_LIMITS = {"bf16": 1e-2, "fp32": 1e-5, "fp64": 1e-5}  # relative; without normalisation only
LAUNCH_PREFIXES = ("TORCHELASTIC_", "OMPI_", "PMI_", "SLURM_")
LAUNCH_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}


def check_export(
    folder: Path, texts: list[str], live: dict[str, np.ndarray], device: str, context: list[str] | None = None
) -> dict[str, float]:
    """Compare a fresh process's vectors from an export with the live model's, and write the figures to export.json.

    Args:
        folder: the export; its merged/ folder, if there is one, is checked too.
        texts: encoded both as queries and as passages.
        live: "query" and "passage" -> [texts, dim], from the model that was exported; of a retriever in two stages
            these are without context, and "query_in_context" and "passage_in_context" with that of `context`.
        device: where the fresh process computes.
        context: documents, as many as the retriever reads; None for one that reads none.

    Returns:
        Largest cosine distance per kind ("query", "passage", "merged_query", "merged_passage"), and the largest
        relative difference of the norms ("query_norm", ...) when vectors are not normalised.

    Raises:
        ValueError: if a figure is above its limit, or the fresh process fails.
    """
    record = read_record(folder)
    folders = [folder] + [path for path in [folder / "merged"] if path.is_dir()]
    figures: dict[str, float] = {}
    for prefix, loaded in zip(("", "merged_"), encode_in_fresh_process(folders, texts, device, context), strict=False):
        for kind, vectors in live.items():
            distance, norm = compare(vectors, loaded[kind])
            figures[prefix + kind] = distance
            if not record["settings"]["normalize"]:
                figures[f"{prefix}{kind}_norm"] = norm
    limits = {name: (NORM_LIMITS if name.endswith("_norm") else COSINE_LIMITS)[record["dtype"]] for name in figures}
    write_record(folder, record | {"check": {"texts": len(texts), "figures": figures, "limits": limits}})
    for name, figure in figures.items():
        if not figure <= limits[name]:  # also true for nan
            raise ValueError(
                f"{folder}: the export is not the trained model: {name} differs by {figure:.3g}, "
                f"allowed is {limits[name]:g}"
            )
    return figures


def compare(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Largest cosine distance and largest relative difference of the norms over rows of [rows, dim]."""
    if a.shape != b.shape:
        raise ValueError(f"the export's vectors have shape {b.shape}, the live model's {a.shape}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(1) / (norm_a * norm_b)
    return float((1 - cosine).max().clip(min=0)), float(np.abs(norm_b / norm_a - 1).max())


def encode_in_fresh_process(
    folders: list[Path], texts: list[str], device: str, context: list[str] | None = None
) -> list[dict[str, np.ndarray]]:
    """Vectors of the texts from each folder, by sentence-transformers in one new process; kinds as check_export's."""
    launched = {name for name in os.environ if name in LAUNCH_VARIABLES or name.startswith(LAUNCH_PREFIXES)}
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    with tempfile.TemporaryDirectory() as scratch:
        request, vectors = Path(scratch, "request.json"), Path(scratch, "vectors.safetensors")
        content = {"folders": [str(path) for path in folders], "texts": texts, "device": device, "answer": str(vectors)}
        content["context"] = context
        request.write_text(json.dumps(content), encoding="utf-8")
        process = subprocess.run(
            [sys.executable, "-m", _PLAIN if context is None else _CONTEXTUAL, str(request)],
            env=environment | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode != 0:
            last = "\n".join(process.stderr.strip().splitlines()[-5:])
            raise ValueError(f"{folders[0]}: a fresh process cannot load the export:\n{last}")
        arrays = load_file(vectors)
    kinds = [*KINDS, *(f"{kind}_in_context" for kind in KINDS if context is not None)]
    return [{kind: arrays[f"{i}.{kind}"] for kind in kinds} for i in range(len(folders))]


def answer(request: dict[str, Any], load: Callable[[str, str], Any]) -> None:
    """Write the vectors that encode_in_fresh_process asks for; `load` makes a model of (folder, device)."""
    arrays, context = {}, request["context"]
    for i, folder in enumerate(request["folders"]):
        model = load(folder, request["device"])
        for suffix in ("", "_in_context")[: 1 if context is None else 2]:
            if suffix:
                model[0].set_context(context)
            given = {"batch_size": 8, "show_progress_bar": False}
            arrays[f"{i}.query{suffix}"] = model.encode_query(request["texts"], **given)
            arrays[f"{i}.passage{suffix}"] = model.encode_document(request["texts"], **given)
    save_file(arrays, request["answer"])


def _plain(folder: str, device: str) -> Any:
    # imported here: it takes seconds, and only the fresh process needs it
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(folder, device=device, local_files_only=True, model_kwargs={"use_safetensors": True})


if __name__ == "__main__":
    answer(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), _plain)
