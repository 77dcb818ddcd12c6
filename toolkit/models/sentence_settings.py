"""What the folder of a sentence-transformers model says of how a text becomes a vector, read from its small files.

Called by start_settings (training) and retrievers (evaluation). No weights are read.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache
from tokenizers.normalizers import Normalizer

from toolkit.models.backbone import load_tokenizer, read_config
from toolkit.models.lengths import longest_input
from toolkit.models.places import base_of_adapter
from toolkit.models.pooling import POOLING_MODES
from toolkit.recipe.errors import RecipeError

MODULES, OPTIONS = "modules.json", "config_sentence_transformers.json"
OUR_POOLING = {mode: name for name, mode in POOLING_MODES.items()}
# The settings of the transformer, by the names of older versions too; the first that is there counts.
TRANSFORMER_OPTIONS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Of the transformer's settings: those that are read here, and those that change no vector, or not in these values.
_READ = {"max_seq_length", "do_lower_case", "model_kwargs", "model_args"}
_PLAIN: dict[str, Any] = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
    "unpad_inputs": None,
}
PASSAGE_NAMES = ("document", "passage", "corpus")
_NO_LIMIT = 10**9  # what a tokenizer names beyond it is none
_LOADING = {"dtype", "torch_dtype", "attn_implementation", "use_safetensors", "add_pooling_layer", "low_cpu_mem_usage"}


class Named(NamedTuple):
    """Settings that a model names: keys of a recipe's encoder section, the file that each is from, and remarks."""

    values: dict[str, Any]
    files: dict[str, str]
    notes: list[str]  # what the model has that training does not follow
    include_prompt: bool = True  # False: the pooling leaves the prefix out


def named_by_folder(folder: Path) -> Named:
    """The settings of a folder with modules.json; a pooling or distance that is not run here stays under its own name.

    Raises:
        RecipeError: for parts that training would drop, and for files that are missing or damaged.
    """
    place = _pooling_place(folder)
    pooling = _read(folder / place / "config.json")
    options = _read(folder / OPTIONS) if (folder / OPTIONS).is_file() else {}
    modes = _modes(pooling)
    values: dict[str, Any] = {"pooling": OUR_POOLING.get(modes, modes)}
    files = {"pooling": f"{place}/config.json"}
    notes = []
    similarity = options.get("similarity_fn_name") or "cosine"  # as sentence-transformers does without one
    if "Normalize" in [kind for kind, _ in _modules(folder)]:
        values["normalize"], files["normalize"] = True, MODULES
    elif similarity in ("cosine", "dot"):
        values["normalize"], files["normalize"] = similarity == "cosine", OPTIONS
    else:
        notes.append(f"compares by {similarity} distance ({OPTIONS}); training compares by dot products")
    prompts = {name: text or "" for name, text in (options.get("prompts") or {}).items()}
    values["query_prefix"], values["passage_prefix"] = prefixes(prompts, options.get("default_prompt_name"))
    files |= dict.fromkeys(("query_prefix", "passage_prefix"), OPTIONS if prompts else "no prompts")
    notes += unused_prompts(prompts, options.get("default_prompt_name"))
    longest, file, cut = _longest(folder)
    if longest is not None:
        values |= dict.fromkeys(("max_tokens", "eval_max_tokens"), longest)
        files |= dict.fromkeys(("max_tokens", "eval_max_tokens"), file)
    if (kept := truncate_dim(folder)) is not None:
        notes.append(cut_note(kept))
    return Named(values, files, [*notes, *cut, *_transformer_notes(folder)], pooling.get("include_prompt", True))


def prefixes(prompts: dict[str, str], default_name: str | None) -> tuple[str, str]:
    """The prefixes of queries and of passages, as encode_query and encode_document of sentence-transformers choose."""
    default = prompts.get(default_name or "", "")
    passage = next((prompts[name] for name in PASSAGE_NAMES if name in prompts), default)
    return prompts.get("query", default), passage


def unused_prompts(prompts: dict[str, str], default_name: str | None) -> list[str]:
    """The remark on a model whose prompts are neither for queries nor for passages, and none of them the default."""
    named = [name for name, text in prompts.items() if text]
    if not named or prompts.keys() & {"query", *PASSAGE_NAMES, default_name}:
        return []
    return [
        f"has prompts under other names than query and document ({', '.join(named)} in {OPTIONS}); no prefix is taken "
        "from them"
    ]


def truncate_dim(folder: Path) -> int | None:
    """The first dimensions of a vector that a folder keeps; None: all. RecipeError for what is no such number."""
    kept = (_read(folder / OPTIONS) if (folder / OPTIONS).is_file() else {}).get("truncate_dim")
    if kept is not None and (type(kept) is not int or kept < 1):
        raise RecipeError(
            f"{folder / OPTIONS}: truncate_dim {json.dumps(kept)} is no number of dimensions; write one, or null"
        )
    return kept


def cut_note(kept: int) -> str:
    """The remark on a model that keeps the first dimensions alone."""
    return f"cuts vectors to {kept} dimensions (truncate_dim in {OPTIONS}); training and export take all of them"


def prompt_problem(pooling: str, *prompts: str) -> str:
    """Why a model whose pooling leaves the prompt out (include_prompt false) cannot be run; empty if it can."""
    if pooling == "eos" or not any(prompts):  # the last token is none of the prompt
        return ""
    return (
        f"its {pooling} pooling leaves the tokens of the prompt out (include_prompt is false), which is not done here; "
        'set its prompts or both prefixes to "", or include_prompt to true'
    )


def _pooling_place(folder: Path) -> str:
    """The folder of the pooling; raises RecipeError for other parts than a transformer, pooling and normalisation."""
    modules = _modules(folder)
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        parts = ", ".join(kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize"))
        raise RecipeError(
            f"{folder}: consists of {', '.join(kinds) or 'nothing'} ({MODULES}); training and export keep a "
            f"Transformer, Pooling and Normalize alone{f', and would drop {parts}' if parts else ''}; to train the "
            f"transformer without the rest, name a copy of the folder without {MODULES} and write every encoder key"
        )
    if modules[0][1]:
        raise RecipeError(
            f"{folder}: its transformer lies in {modules[0][1]} ({MODULES}), as old versions wrote it; load it with "
            "sentence-transformers, save it again and name that folder"
        )
    return modules[1][1]


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Kind and folder of each module; a class that is not the library's keeps its whole name."""
    try:
        modules = [(str(module["type"]), str(module["path"])) for module in _read(folder / MODULES)]
    except (KeyError, TypeError):
        raise RecipeError(
            f"{folder / MODULES}: names no type and path of each module; write the folder again"
        ) from None
    return [
        (name.rpartition(".")[2] if name.startswith("sentence_transformers.") else name, at) for name, at in modules
    ]


def _modes(pooling: dict[str, Any]) -> str:
    modes = pooling.get("pooling_mode") or [mode for key, mode in _OLD_POOLING.items() if pooling.get(key)] or "mean"
    return modes if isinstance(modes, str) else "+".join(modes)


def _longest(folder: Path) -> tuple[int | None, str, list[str]]:
    """The longest input in tokens, the file that says so, and a remark where the model cannot read that many.

    None where nothing says it: an adapter whose base is not on this machine.
    """
    place = folder if (folder / "config.json").is_file() else _base(folder)
    usable = None if place is None else longest_input(read_config(place))
    positions = "config.json" if place == folder else "config.json of the base"
    file, options = _transformer_options(folder)
    wanted = options.get("max_seq_length")
    if wanted is None:
        file, path = "tokenizer_config.json", folder / "tokenizer_config.json"
        wanted = _read(path).get("model_max_length") if path.is_file() else None
        if wanted is None or wanted >= (_NO_LIMIT if usable is None else usable):
            return usable, positions, []
        return int(wanted), file, []
    if usable is not None and wanted > usable:
        return usable, positions, [above_positions(wanted, usable, file)]
    return int(wanted), file, []


def _base(adapter: Path) -> Path | None:
    """The folder of the model that an adapter applies to, if it is on this machine."""
    name = base_of_adapter(adapter)
    kept = str(Path(name) / "config.json") if Path(name).is_absolute() else try_to_load_from_cache(name, "config.json")
    return Path(kept).parent if isinstance(kept, str) else None


def above_positions(wanted: int, usable: int, file: str) -> str:
    """The remark on a model that names a longer input than it has positions for."""
    return f"names a max_seq_length of {wanted} ({file}) and has positions for {usable} tokens; {usable} are read"


def _transformer_options(folder: Path) -> tuple[str, dict[str, Any]]:
    name = next((name for name in TRANSFORMER_OPTIONS if (folder / name).is_file()), None)
    return (name, _read(folder / name)) if name else (TRANSFORMER_OPTIONS[0], {})


def _transformer_notes(folder: Path) -> list[str]:
    """Settings of the transformer that training does not follow; those that change every text are refused."""
    file, options = _transformer_options(folder)
    if options.get("do_lower_case") and not _lowers(load_tokenizer(folder).backend_tokenizer.normalizer):
        raise RecipeError(
            f"{folder}: texts are lower-cased by do_lower_case ({file}), not by the tokenizer, which training reads; "
            "load it with sentence-transformers and save it again, which writes that into tokenizer.json"
        )
    loading = (options.get("model_kwargs") or options.get("model_args") or {}).keys() - _LOADING
    unread = [key for key, value in options.items() if key not in _READ and value and value != _PLAIN.get(key)]
    unread += [f"model_kwargs.{key}" for key in sorted(loading)]
    return [f"sets {', '.join(unread)} ({file}), which training does not read"] if unread else []


def _lowers(normalizer: Normalizer | None) -> bool:
    return normalizer is not None and normalizer.normalize_str("Aa") == "aa"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no valid JSON"
        raise RecipeError(f"{path}: cannot be read ({reason}); write the model's folder again") from None
