"""What sentence-transformers (6 and later) reads beside the weights: tokenizer, prompts, pooling, normalisation.

Called by export.
"""

import copy
import json
from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from toolkit.data.tokens import frame
from toolkit.models.pooling import POOLING_MODES
from toolkit.recipe.models import EncoderSettings

CONTEXTUAL = "toolkit.retrieval.sentence_module.ContextualRetriever"
"""The class that sentence-transformers loads for a contextual retriever; it is this package's, not the folder's."""


def write_layout(
    folder: Path,
    settings: EncoderSettings,
    tokenizer: Any,
    hidden_size: int,
    options: dict[str, Any],
    contextual: bool = False,
) -> None:
    """The files of sentence-transformers (layout of version 5 and later).

    Args:
        options: those of AutoModel; without dtype an adapter's base would load in the number format of its own config.
        contextual: the folder is one module, CONTEXTUAL, which reads its files itself.
    """
    tokenizer.save_pretrained(folder)
    prompts = {"query": settings.query_prefix} | dict.fromkeys(("document", "passage"), settings.passage_prefix)
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if settings.normalize else "dot",
        },
    )
    if contextual:
        _write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": CONTEXTUAL}])
        return
    name = "sentence_transformers.{}".format
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": name("base.modules.transformer.Transformer")},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": name("sentence_transformer.modules.pooling.Pooling")},
    ]
    (folder / "1_Pooling").mkdir()
    _write_json(
        folder / "1_Pooling" / "config.json",
        {
            "embedding_dimension": hidden_size,
            "pooling_mode": POOLING_MODES[settings.pooling],
            "include_prompt": True,
        },
    )
    if settings.normalize:
        modules.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": name("base.modules.normalize.Normalize")})
        (folder / "2_Normalize").mkdir()
        _write_json(folder / "2_Normalize" / "config.json", {})
    _write_json(folder / "modules.json", modules)
    _write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
            "max_seq_length": settings.eval_max_tokens,
            "model_kwargs": options,
        },
    )


def retriever_tokenizer(tokenizer: Any, settings: EncoderSettings) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer whose plain call gives the ids of `toolkit.data.tokens.tokenize` (without prefix).

    It puts the special ids of `toolkit.data.tokens.frame` around every text, also where the text is cut at
    eval_max_tokens; it cuts and pads on the right. It loads as PreTrainedTokenizerFast because the model-specific
    classes rebuild their special tokens on loading and would drop the end token.

    Raises:
        ValueError: if the tokenizer adds an end token by itself that cannot be taken away.
    """
    backend = without_limits(tokenizer).backend_tokenizer
    own, wanted = frame(tokenizer, None), frame(tokenizer, settings.append_eos)
    if len(wanted[1]) > len(own[1]):
        end = processors.TemplateProcessing(
            single=["$A", tokenizer.eos_token],
            pair=["$A", "$B", tokenizer.eos_token],
            special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)],
        )
        before = backend.post_processor
        backend.post_processor = end if before is None else processors.Sequence([before, end])
    elif own != wanted:
        _drop_end(backend)
    tokens = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    exported = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"pad_token": tokenizer.eos_token, **tokens},
        model_max_length=settings.eval_max_tokens,
        padding_side="right",
        truncation_side="right",
        model_input_names=["input_ids", "attention_mask"],
        split_special_tokens=tokenizer.split_special_tokens,  # whether "</s>" in a text is text
    )
    if frame(exported, None) != wanted:
        raise ValueError("the tokenizer's own end token cannot be switched to encoder.append_eos; change append_eos")
    return exported


def without_limits(tokenizer: Any) -> Any:
    """A copy without the cut and padding that the last call left in its backend."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _drop_end(backend: Any) -> None:
    """Take what comes after a text out of the templates of a backend's post-processor."""
    whole = json.loads(backend.to_str())
    whole["post_processor"] = _without_end(whole["post_processor"])
    backend.post_processor = type(backend).from_str(json.dumps(whole)).post_processor


def _without_end(processor: dict[str, Any]) -> dict[str, Any]:
    """A post-processor as tokenizer.json has it, whose templates end with the text."""
    match processor["type"]:
        case "Sequence":
            return processor | {"processors": [_without_end(part) for part in processor["processors"]]}
        case "TemplateProcessing":
            kept = {key: list(processor[key]) for key in ("single", "pair")}
            for pieces in kept.values():
                while "SpecialToken" in pieces[-1]:
                    pieces.pop()
            return processor | kept
        case "BertProcessing" | "RobertaProcessing":  # [CLS] text [SEP]; offsets, which nobody reads, stay untrimmed
            name, number = processor["cls"]
            first = {"SpecialToken": {"id": name, "type_id": 0}}
            single, second = ([first, {"Sequence": {"id": part, "type_id": 0}}] for part in ("A", "B"))
            special = {name: {"id": name, "ids": [number], "tokens": [name]}}
            return {"type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": special}
        case _:
            return processor


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
