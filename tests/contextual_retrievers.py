"""Tiny retrievers in two stages, as training holds them when it exports; shared by tests of export and evaluation."""

from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from tiny_retriever import CARD, TARGETS, TEXTS, small_model

from toolkit.export.write import ContextualParts, write_export
from toolkit.models.backbone import add_lora, load_encoder_backbone, load_tokenizer
from toolkit.models.contextual import ContextualEncoder
from toolkit.models.in_context import in_context
from toolkit.models.retriever import First, Retriever
from toolkit.models.two_adapters import add_first
from toolkit.prepare.models import ModelSource
from toolkit.recipe.context import ContextSettings
from toolkit.recipe.models import EncoderSettings
from toolkit.retrieval.context import context_documents, embed_context
from toolkit.retrieval.embed import embed_texts

DOCUMENTS = [f"{text} {number}" for number, text in enumerate(TEXTS * 2)]


class Case(NamedTuple):
    kind: str
    tokenizer: str
    first: str | None = "own"  # "own": a model like the second's; another kind of model; None: a second adapter
    lora: bool = False
    context: Any = MappingProxyType({})
    pooling: Any = "mean"
    dtype: torch.dtype = torch.float32


CASES = {
    "bert": Case("bert", "wordpiece", context={"null_probability": 0.1}),
    "modernbert": Case("modernbert", "cls_sep", context={"vectors_per_document": 2, "pool": "after_instruction"}),
    "llama_adapters": Case("llama", "bos", None, True, {"form": "projected", "head": "none"}, "eos"),
    "qwen3_small_first": Case("qwen3", "plain", "bert", True, {"form": "projected", "head": "none"}, "eos"),
    "llama_bf16": Case("llama", "bos", "own", False, {"form": "projected"}, "eos", torch.bfloat16),
}


class MadeContextual(NamedTuple):
    case: Case
    retriever: Retriever  # with its weights
    base: ModelSource
    parts: ContextualParts
    live: dict[str, np.ndarray]  # as check_export takes them
    context: list[str]

    def write(self, folder: Path, merged: bool = False) -> Path:
        encoder: Any = self.retriever.encoder
        state = self.parts.state
        below = {name.removeprefix("backbone."): w for name, w in state.items() if name.startswith("backbone.")}
        write_export(
            folder,
            backbone=encoder.backbone,
            state=below,
            settings=self.retriever.settings,
            tokenizer=self.retriever.tokenizer,
            base=self.base,
            dtype=self.case.dtype,
            merged=merged,
            card=CARD | {"method": "cde"},
            contextual=self.parts,
        )
        return folder


def make_contextual(case: Case, folder: Path) -> MadeContextual:
    base = small_model(case.kind, folder / "base", case.tokenizer)
    given = {"size": 6, "max_tokens": 20, "form": "tokens", "head": "residual", "soft_prompts": 2} | dict(case.context)
    settings = EncoderSettings(
        pooling=case.pooling, normalize=True, append_eos=True, query_prefix="find: ", passage_prefix="text: ",
        max_tokens=16, eval_max_tokens=24,
    )  # fmt: skip
    torch.manual_seed(1)
    backbone: Any = load_encoder_backbone(base, case.dtype)
    if case.lora:
        backbone = add_lora(backbone, 4, 8.0, 0.0, TARGETS[case.kind], causal=False, seed=1)
    first, first_folder = None, None
    if case.first is None:
        add_first(backbone, backbone.peft_config["default"], seed=2)
    else:
        other = case.first != "own"
        first_folder = small_model(case.first, folder / "small", "wordpiece") if other else base
        first = load_encoder_backbone(first_folder, case.dtype)
    encoder = ContextualEncoder(
        backbone, first, ContextSettings.model_validate(given), case.pooling, normalize=True, instruction_end=5
    ).to(case.dtype)
    for name, weight in encoder.named_parameters():
        if "lora_B" in name or name.startswith("first_backbone."):  # unlike what they start from
            torch.nn.init.normal_(weight, std=0.05)
        elif not name.startswith("backbone."):
            torch.nn.init.normal_(weight, std=0.3)
    tokenizer = load_tokenizer(base)
    own = tokenizer if first_folder is None else load_tokenizer(first_folder)
    retriever = Retriever(encoder.eval(), tokenizer, settings, First(own, "live"))
    documents = [DOCUMENTS[i % len(DOCUMENTS)] for i in range(context_documents(retriever))]
    reads = in_context(retriever, embed_context(retriever, documents, "test"))
    live = {kind: embed_texts(retriever, TEXTS, kind) for kind in ("query", "passage")}
    live |= {f"{kind}_in_context": embed_texts(reads, TEXTS, kind) for kind in ("query", "passage")}
    state = {name: weight.detach().clone() for name, weight in encoder.named_parameters() if weight.requires_grad}
    parts = ContextualParts(encoder, state, first_folder)
    return MadeContextual(case, retriever, ModelSource(base, str(base), None), parts, live, documents)
