"""Any retriever by folder or hub id: an export, a sentence-transformers model, a base model with or without adapter.

Called by eval.run. Reads safetensors only and runs no code that comes with weights.
"""

import itertools
import socket
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

from toolkit.collectives import rank
from toolkit.data.tokens import pad, pad_id, tokenize
from toolkit.embed import Retriever, load_retriever
from toolkit.export import load_export
from toolkit.files import expanded
from toolkit.models.backbone import check_adapter, check_length, check_weights, read_config
from toolkit.models.encoder import Encoder
from toolkit.models.formats import lacks_weights
from toolkit.models.vocabulary import fit_tokenizer
from toolkit.prepare import ADAPTER_CONFIG, base_of_adapter, holds_bare_adapter, hub_problem, on_every_rank, together
from toolkit.recipe import EncoderSettings, EvalSettings, RecipeError
from toolkit.retriever_settings import changed
from toolkit.sentence_layout import POOLING_MODES

FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "merges.txt", "vocab.txt"]
NOT_FILES = ["*/*.safetensors", "consolidated*", "*.bin", "*.py", "onnx/*", "openvino/*"]
COSINE_LIMIT = {torch.float32: 1e-5}  # to sentence-transformers' own vectors; other number formats: 1e-3
CHECKED = ("a", "Which plants turn light into sugar?", "Leaves do. " * 10, "Light falls on leaves, " * 300)


class Loaded(NamedTuple):
    """A retriever, and prefixes that its folder names for certain tasks."""

    retriever: Retriever
    prompts: dict[str, str]


def load_any(what: str, adapter: str | None, changes: EvalSettings, device: torch.device) -> Loaded:
    """A retriever by folder or hub id, in eval mode; every rank calls it.

    Args:
        what: an export, a sentence-transformers model, an adapter (with the name of its base) or a base model.
        adapter: folder or hub id of an adapter for the base model `what`.
        changes: a base model names neither pooling, normalisation nor length, so these must.

    Raises:
        RecipeError: for what is none of these, damaged, or cannot be run here; one line with the fix.
    """
    folder = _find(what)
    added = None if adapter is None else _find(adapter)
    base = None
    if added is None:
        base = together(lambda: base_of_adapter(folder) if _is_bare_adapter(folder) else None)
    if base is not None:
        added = folder
    of = folder if base is None else _find(base)
    return on_every_rank(lambda: _load(what, of, added, changes, device))


def _load(what: str, folder: Path, adapter: Path | None, changes: EvalSettings, device: torch.device) -> Loaded:
    if adapter is None and (folder / "export.json").is_file():
        return Loaded(load_export(folder, device), {})
    if adapter is None and (folder / "modules.json").is_file():
        _check_transformer(folder)
        return _sentence_transformer(what, folder, device)
    if not (folder / "config.json").is_file():
        raise RecipeError(
            f"{what}: is no export (export.json), no sentence-transformers model (modules.json), no adapter "
            f"({ADAPTER_CONFIG}) and no model (config.json); name one, or bm25"
        )
    return Loaded(_plain(what, folder, adapter, changes, device), {})


def _check_transformer(folder: Path) -> None:
    """Raise RecipeError unless the transformer of a sentence-transformers model has all its weights, and no others."""
    for place in (folder, folder / "0_Transformer"):
        if holds_bare_adapter(place):
            check_adapter(base_of_adapter(place), place)
        elif (place / "config.json").is_file():
            if problem := lacks_weights(place):
                raise RecipeError(problem)
            check_weights(place)


def _is_bare_adapter(folder: Path) -> bool:
    own = any((folder / name).is_file() for name in ("export.json", "modules.json"))
    return not own and holds_bare_adapter(folder)


def _find(what: str) -> Path:
    """A folder as it is; anything else that can be a hub id is fetched: rank 0 first, then the others.

    Which of them it is rank 0 decides, as the ranks would wait for one another in different places.
    """
    folder = expanded(what)
    if together(folder.is_dir):
        on_every_rank(lambda: _check_there(folder))
        return folder
    if folder.is_absolute() or what.startswith((".", "~")) or what.count("/") > 1:
        raise RecipeError(f"{what}: no such folder; name the folder of a retriever, its id on the hub, or bm25")
    path = Path(together(lambda: _snapshot(what)))
    return Path(on_every_rank(lambda: path if rank() == 0 else _snapshot(what)))


def _check_there(folder: Path) -> None:
    if not folder.is_dir():
        raise RecipeError(f"{folder} is not on {socket.gethostname()}; put it on a disk that all nodes share")


def _snapshot(hub: str) -> str:
    try:
        return snapshot_download(hub, allow_patterns=FILES, ignore_patterns=NOT_FILES)
    except (OSError, ValueError, HTTPError) as error:  # the hub's own errors are kinds of these
        problem = hub_problem(hub, error, "name that")
        raise RecipeError(f"{hub}: no such folder, not bm25, and as a hub id: {problem}") from None


# --------------------------------------------------------------------------- a base model


def _plain(what: str, folder: Path, adapter: Path | None, changes: EvalSettings, device: torch.device) -> Retriever:
    wanted = {"pooling": changes.pooling, "normalize": changes.normalize, "max_tokens": changes.max_tokens}
    missing = ["--" + key.replace("_", "-") for key, value in wanted.items() if value is None]
    if missing:
        raise RecipeError(f"{what}: a model alone does not say how a text becomes one vector; add {', '.join(missing)}")
    settings = changed(_settings("mean", False, "", "", 2), changes)
    dtype = torch.bfloat16 if read_config(folder).dtype == torch.bfloat16 else torch.float32
    return load_retriever(folder, settings, dtype, device, adapter)


def _settings(pooling: Any, normalize: bool, query: str, passage: str, max_tokens: int) -> EncoderSettings:
    """With the tokenizer's own special ids."""
    return EncoderSettings(
        pooling=pooling,
        normalize=normalize,
        append_eos=None,
        query_prefix=query,
        passage_prefix=passage,
        max_tokens=max_tokens,
        eval_max_tokens=max_tokens,
    )


# --------------------------------------------------------------------------- sentence-transformers


def _sentence_transformer(what: str, folder: Path, device: torch.device) -> Loaded:
    """Its transformer, pooling and normalisation as an Encoder; a few texts prove that the vectors are the same."""
    from sentence_transformers import SentenceTransformer  # takes seconds to import

    try:
        model = SentenceTransformer(
            str(folder),
            device=str(device),
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(f"{what}: sentence-transformers cannot load it ({reason}); mend the folder") from None
    modules: list[Any] = list(model)
    names = [type(module).__name__ for module in modules]
    ours = {mode: name for name, mode in POOLING_MODES.items()}
    known = names in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
    if not known or modules[1].pooling_mode not in ours or not modules[1].include_prompt:
        parts = [
            f"{name} ({module.pooling_mode})" if name == "Pooling" else name
            for name, module in zip(names, modules, strict=True)
        ]
        raise RecipeError(
            f"{what}: consists of {', '.join(parts)}; run are a Transformer, Pooling over all tokens by "
            f"{', '.join(ours)}, and Normalize, so export it without the other parts"
        )
    if model.similarity_fn_name not in ("cosine", "dot"):  # cosine also where its config names none
        raise RecipeError(
            f"{what}: compares by {model.similarity_fn_name} distance (config_sentence_transformers.json); run are "
            "similarity_fn_name cosine and dot"
        )
    tokenizer = modules[0].tokenizer  # the model's own, so that it cuts and pads on the right in the comparison below
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.eos_token is None:  # [CLS] text [SEP]
        tokenizer.eos_token = tokenizer.sep_token
    backbone, prompts = modules[0].auto_model, {name: text or "" for name, text in model.prompts.items()}
    limits = (model.max_seq_length, tokenizer.model_max_length, backbone.config.max_position_embeddings)
    longest = min(limit for limit in limits if limit is not None)
    default = prompts.get(model.default_prompt_name or "", "")
    document = next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), default)
    settings = _settings(
        ours[modules[1].pooling_mode],
        names[-1] == "Normalize" or model.similarity_fn_name == "cosine",
        prompts.get("query", default),
        document,
        int(longest),
    )
    check_length(backbone.config, settings.eval_max_tokens)
    fit_tokenizer(tokenizer, backbone.config, what)
    retriever = Retriever(Encoder(backbone, settings.pooling, settings.normalize).eval(), tokenizer, settings)
    _check_same(what, retriever, model)
    named = {name: text for name, text in prompts.items() if name not in ("query", "document", "passage", "corpus")}
    return Loaded(retriever, named)


@torch.inference_mode()
def _check_same(what: str, retriever: Retriever, model: Any) -> None:
    """Raise RecipeError unless our vectors of a few texts are those of sentence-transformers."""
    settings, tokenizer = retriever.settings, retriever.tokenizer
    weight = next(retriever.encoder.parameters())
    sides = ((settings.query_prefix, model.encode_query), (settings.passage_prefix, model.encode_document))
    for (prefix, encode), text in itertools.product(sides, CHECKED):
        rows = tokenize(tokenizer, [text], prefix, settings.eval_max_tokens, settings.append_eos)
        tokens = pad(rows, pad_id(tokenizer))
        own = retriever.encoder(type(tokens)(*(part.to(weight.device) for part in tokens)))[0].float().cpu().numpy()
        theirs = np.asarray(encode([text], show_progress_bar=False)[0], np.float32)
        cosine = float(own @ theirs / (np.linalg.norm(own) * np.linalg.norm(theirs)))
        if not 1 - cosine <= COSINE_LIMIT.get(weight.dtype, 1e-3):  # also true for nan
            raise RecipeError(
                f"{what}: our vectors are not those of sentence-transformers (cosine {cosine:.6f} for {text[:20]!r}), "
                "so it has settings that are not known here; it cannot be scored"
            )
