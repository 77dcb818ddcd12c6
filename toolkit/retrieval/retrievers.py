"""Any retriever by folder or hub id: an export, a sentence-transformers model, a base model with or without adapter.

Called by eval.run. Reads safetensors only and runs no code that comes with weights.
"""

import itertools
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

from toolkit.collectives import rank
from toolkit.data.tokens import pad, pad_id, tokenize
from toolkit.export.write import load_export
from toolkit.files import expanded
from toolkit.models.backbone import check_adapter, check_weights, read_config
from toolkit.models.contextual_files import FIRST_FOLDER, is_contextual
from toolkit.models.encoder import Encoder
from toolkit.models.formats import ADAPTER_CONFIG, lacks_weights
from toolkit.models.in_context import KEPT
from toolkit.models.lengths import check_length, longest_input
from toolkit.models.places import base_of_adapter, holds_bare_adapter, hub_problem
from toolkit.models.retriever import Retriever, load_retriever
from toolkit.models.sentence_settings import OUR_POOLING, above_positions, prefixes, prompt_problem, unused_prompts
from toolkit.models.vocabulary import fit_tokenizer
from toolkit.ranks.together import on_every_rank, together
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.evaluation import EvalSettings
from toolkit.recipe.models import EncoderSettings
from toolkit.retrieval.settings import changed

FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "merges.txt", "vocab.txt"]
DENSE_FILES = ["*_Dense/model.safetensors"]
NOT_FILES = ["*/*.safetensors", "consolidated*", "*.bin", "*.py", "onnx/*", "openvino/*"]
COSINE_LIMIT = {torch.float32: 1e-5}  # to sentence-transformers' own vectors; other number formats: 1e-3
_PARTS = ["Transformer", "Pooling"]  # and then, each or none, in this order:
_MORE_PARTS = ([], ["Normalize"], ["Dense"], ["Dense", "Normalize"])
CHECKED = ("a", "Which plants turn light into sugar?", "Leaves do. " * 10, "Light falls on leaves, " * 300)


class Loaded(NamedTuple):
    """A retriever, and prefixes that its folder names for certain tasks."""

    retriever: Retriever
    prompts: dict[str, str]


def load_any(what: str, adapter: str | None, changes: EvalSettings, device: torch.device, dense: bool = True) -> Loaded:
    """A retriever by folder or hub id, in eval mode; every rank calls it.

    Args:
        what: an export, a sentence-transformers model, an adapter (with the name of its base) or a base model.
        adapter: folder or hub id of an adapter for the base model `what`.
        changes: a base model names neither pooling, normalisation nor length, so these must.
        dense: False leaves out the dense layer that a sentence-transformers model has after its pooling.

    Raises:
        RecipeError: for what is none of these, damaged, or cannot be run here; one line with the fix.
    """
    folder = find_retriever(what)
    added = None if adapter is None else _find_adapter(adapter, what)
    base = None
    if added is None:
        base = together(lambda: base_of_adapter(folder) if _is_bare_adapter(folder) else None)
    if base is not None:
        added = folder
    of = folder if base is None else find_retriever(base)
    loaded = on_every_rank(lambda: _load(what, of, added, changes, device))
    return loaded if dense else loaded._replace(retriever=on_every_rank(lambda: _without_dense(what, loaded.retriever)))


def _find_adapter(adapter: str, what: str) -> Path:
    found = find_retriever(adapter)
    if together(lambda: is_contextual(found)):
        fix = f"name it in place of {what}"
        raise RecipeError(f"{adapter}: reads texts with a context, which --adapter would lose; {fix}")
    return found


def _without_dense(what: str, retriever: Retriever) -> Retriever:
    encoder, settings = retriever.encoder, retriever.settings
    if encoder.dense is None:
        raise RecipeError(f"{what}: has no dense layer that could be left out; remove dense")
    plain = Encoder(encoder.backbone, settings.pooling, settings.normalize, settings.truncate_dim).eval()
    return retriever._replace(encoder=plain)


def _load(what: str, folder: Path, adapter: Path | None, changes: EvalSettings, device: torch.device) -> Loaded:
    if adapter is None and (folder / "export.json").is_file():
        retriever = load_export(folder, device)
        backbone: Any = retriever.encoder.backbone
        _check_flag(what, backbone.config, changes)
        return Loaded(retriever, {})
    if adapter is None and (folder / "modules.json").is_file():
        _check_transformer(folder)
        return _sentence_transformer(what, folder, changes, device)
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
    for place in folder.glob("*_Dense"):
        if not (place / "model.safetensors").is_file():
            raise RecipeError(
                f"{place}: has no model.safetensors; where you trust its pytorch_model.bin, load the whole model with "
                "sentence-transformers, save it again (save_pretrained), and name that folder"
            )


def _check_flag(what: str, config: Any, changes: EvalSettings) -> None:
    if changes.max_tokens is not None:
        try:
            check_length(config, changes.max_tokens, "--max-tokens")
        except ValueError as error:
            raise RecipeError(f"{what}: {error}") from None


def _is_bare_adapter(folder: Path) -> bool:
    own = any((folder / name).is_file() for name in ("export.json", "modules.json"))
    return not own and holds_bare_adapter(folder)


def names_no_retriever(what: str) -> bool:
    """Whether it is no folder here and can be no hub id."""
    return _is_path(what) and not expanded(what).is_dir()


def _is_path(what: str) -> bool:
    """Whether it can be no hub id."""
    return expanded(what).is_absolute() or what.startswith((".", "~")) or what.count("/") > 1


def find_retriever(what: str) -> Path:
    """A folder as it is; anything else that can be a hub id is fetched: rank 0 first, then the others.

    Which of them it is rank 0 decides, as the ranks would wait for one another in different places.

    Raises:
        RecipeError: for no folder, and what cannot be fetched.
    """
    folder = expanded(what)
    if together(folder.is_dir):
        on_every_rank(lambda: _check_there(folder))
        return folder
    if _is_path(what):
        raise RecipeError(f"{what}: no such folder; name the folder of a retriever, its id on the hub, or bm25")
    path = Path(together(lambda: _snapshot(what)))
    return Path(on_every_rank(lambda: path if rank() == 0 else _snapshot(what)))


def _check_there(folder: Path) -> None:
    if not folder.is_dir():
        raise RecipeError(f"{folder} is not on {socket.gethostname()}; put it on a disk that all nodes share")


def _snapshot(hub: str) -> str:
    try:
        found = snapshot_download(hub, allow_patterns=FILES, ignore_patterns=NOT_FILES)
        if any(Path(found).glob("*_Dense")):
            snapshot_download(hub, allow_patterns=DENSE_FILES)
        if is_contextual(Path(found)):  # its first stage, and a context
            snapshot_download(hub, allow_patterns=[f"{FIRST_FOLDER}/*", str(KEPT)], ignore_patterns=["*.bin", "*.py"])
        return found
    except (OSError, ValueError, HTTPError) as error:  # the hub's own errors are kinds of these
        problem = hub_problem(hub, error, "name that")
        raise RecipeError(f"{hub}: no such folder, not bm25, and as a hub id: {problem}") from None


# --------------------------------------------------------------------------- a base model


def _plain(what: str, folder: Path, adapter: Path | None, changes: EvalSettings, device: torch.device) -> Retriever:
    wanted = {"pooling": changes.pooling, "normalize": changes.normalize, "max_tokens": changes.max_tokens}
    missing = ["--" + key.replace("_", "-") for key, value in wanted.items() if value is None]
    if missing:
        raise RecipeError(f"{what}: a model alone does not say how a text becomes one vector; add {', '.join(missing)}")
    settings, config = changed(_settings("mean", False, "", "", 2), changes), read_config(folder)
    _check_flag(what, config, changes)
    dtype = torch.bfloat16 if config.dtype == torch.bfloat16 else torch.float32
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


def _sentence_transformer(what: str, folder: Path, changes: EvalSettings, device: torch.device) -> Loaded:
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
    known = names[:2] == _PARTS and names[2:] in _MORE_PARTS
    if not known or modules[1].pooling_mode not in OUR_POOLING:
        parts = [
            f"{name} ({module.pooling_mode})" if name == "Pooling" else name
            for name, module in zip(names, modules, strict=True)
        ]
        raise RecipeError(
            f"{what}: consists of {', '.join(parts)}; run are a Transformer, Pooling by {', '.join(OUR_POOLING)}, "
            "Dense and Normalize, so export it without the other parts"
        )
    dense = _dense(what, modules[2]) if "Dense" in names else None
    similarity = _similarity(what, model, names)
    tokenizer = modules[0].tokenizer  # the model's own, so that it cuts and pads on the right in the comparison below
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.eos_token is None:  # [CLS] text [SEP]
        tokenizer.eos_token = tokenizer.sep_token
    for side, prefix in (("query", changes.query_prefix), ("document", changes.passage_prefix)):
        model.prompts |= {} if prefix is None else {side: prefix}
    prompts = {name: text or "" for name, text in model.prompts.items()}
    named = {name: text for name, text in prompts.items() if name not in ("query", "document", "passage", "corpus")}
    query, passage = prefixes(prompts, model.default_prompt_name)
    for note in unused_prompts(prompts, model.default_prompt_name) if rank() == 0 else []:
        print(f"note: {what}: {note} but for tasks of these names", file=sys.stderr, flush=True)
    pooling = OUR_POOLING[modules[1].pooling_mode]
    used = [query, passage, *(named | changes.prompts).values()]
    if not modules[1].include_prompt and (reason := prompt_problem(changes.pooling or pooling, *used)):
        raise RecipeError(f"{what}: {reason}")
    model.max_seq_length = _longest(what, model, changes)
    normalize = names[-1] == "Normalize" or similarity == "cosine"
    settings = _settings(pooling, normalize, query, passage, model.max_seq_length)
    settings = settings.model_copy(update={"truncate_dim": model.truncate_dim})
    backbone: Any = modules[0].auto_model
    fit_tokenizer(tokenizer, backbone.config, what)
    encoder = Encoder(backbone, pooling, normalize, model.truncate_dim, dense).eval()
    retriever = Retriever(encoder, tokenizer, settings)
    _check_same(what, retriever, model)
    return Loaded(retriever, named)


def _dense(what: str, module: Any) -> Any:
    """The linear layer of a Dense; RecipeError for one that does more than that."""
    activation = type(module.activation_function).__name__
    plain = module.module_input_name == module.module_output_name == "sentence_embedding" and not module.use_residual
    if activation != "Identity" or not plain:
        extra = f"activation {activation}" if plain else "other inputs and outputs than the pooled vector"
        raise RecipeError(f"{what}: its Dense has {extra}; run is a linear layer of the pooled vector alone")
    return module.linear


def _similarity(what: str, model: Any, names: list[str]) -> str:
    """How a model compares vectors: "cosine", also where its config names nothing, or "dot"."""
    similarity, options = model.similarity_fn_name, "config_sentence_transformers.json"
    if similarity not in ("cosine", "dot"):
        raise RecipeError(
            f"{what}: compares by {similarity} distance ({options}); run are similarity_fn_name cosine and dot"
        )
    if similarity == "dot" and names[-1] == "Normalize" and model.truncate_dim is not None:
        raise RecipeError(
            f"{what}: cuts vectors of unit length (truncate_dim) and compares the rest by dot products ({options}), "
            "which is not done here; set similarity_fn_name to cosine"
        )
    return similarity


def _longest(what: str, model: Any, changes: EvalSettings) -> int:
    """The longest input in tokens: as --max-tokens says, else as the model does, as far as it has positions."""
    config = model[0].auto_model.config
    _check_flag(what, config, changes)
    wanted, usable = model.max_seq_length, longest_input(config)
    if changes.max_tokens is not None:
        return changes.max_tokens
    if usable is None:
        if wanted is None:
            raise RecipeError(f"{what}: names no longest input, and its positions have no end; add --max-tokens")
        return int(wanted)
    if wanted is not None and wanted > usable and rank() == 0:
        note = above_positions(wanted, usable, "sentence_bert_config.json or tokenizer_config.json")
        print(f"note: {what}: {note}", file=sys.stderr, flush=True)
    return usable if wanted is None else int(min(wanted, usable))


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
