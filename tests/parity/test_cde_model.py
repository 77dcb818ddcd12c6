"""The two-stage model against the authors' own numbers, and where these hold no case against the same equations in
plain torch, which are compared with them too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_cde as plain
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, NomicBertConfig, NomicBertModel

from toolkit.data.tokens import Tokens
from toolkit.models.contextual import ContextualEncoder, pool_parts
from toolkit.models.pooling import pool
from toolkit.recipe.context import ContextSettings

FIXTURES = Path(__file__).parent.parent / "fixtures" / "cde"
BOUND = 2e-6  # of models in fp64 whose weights were stored in fp32
COLON = 5  # ends an instruction
OURS = {
    "emb_ln": "embeddings.LayerNorm",
    "encoder.layers": "layers",
    "attn.out_proj": "self_attn.o_proj",
    "mlp.fc11": "mlp.up_proj",
    "mlp.fc12": "mlp.gate_proj",
    "mlp.fc2": "mlp.down_proj",
    "norm1": "post_attention_layernorm",
    "norm2": "post_mlp_layernorm",
    "first_stage_model.embedder.": "first_backbone.",
    "second_stage_model.backbone.": "backbone.",
    "first_stage_model.mlp.": "first_head.",
    "second_stage_model.prompt_projection.": "prompts.",
    "second_stage_model.output_projection.": "head.",
    "second_stage_model.sequence_dropout_null_embedding": "null.weight",
}


def load(name: str) -> dict[str, dict[str, Tensor]]:
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as data:
        found: dict[str, dict[str, Tensor]] = {}
        for key in data:
            kind, _, rest = key.partition("/")
            value = torch.tensor(data[key])
            found.setdefault(kind, {})[rest] = value.double() if value.is_floating_point() else value
    return found


NOMIC, LLAMA = load("encoder"), load("causal")
W = NOMIC["weights"]


def ours(name: str) -> str:
    for theirs, own in OURS.items():
        name = name.replace(theirs, own)
    return name


def as_ours(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names: queries, keys and values apart."""
    state = {}
    for name, value in weights.items():
        if "attn.Wqkv" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                state[ours(name.replace("attn.Wqkv", f"self_attn.{letter}_proj"))] = part
        else:
            state[ours(name)] = value[None] if "null_embedding" in name else value
    return state


def backbone() -> NomicBertModel:
    config = NomicBertConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-12,
        type_vocab_size=2, pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )  # fmt: skip
    return NomicBertModel(config)


def encoder(**changes: Any) -> ContextualEncoder:
    keys = {"size": 6, "max_tokens": 9, "form": "tokens", "null_probability": 0.25, "head": "residual"} | changes
    made = ContextualEncoder(
        backbone(), backbone(), ContextSettings(**keys), "mean", False, instruction_end=COLON
    ).double()
    state = {name: value for name, value in as_ours(W).items() if made.head is not None or not name.startswith("head.")}
    made.load_state_dict(state)
    return made


def tokens(name: str, given: dict[str, Tensor] = NOMIC["given"]) -> Tokens:
    return Tokens(given[f"{name}_ids"], given[f"{name}_mask"])


def error(found: Tensor, expected: Tensor) -> float:
    """max |a - b| / max |b|"""
    assert found.shape == expected.shape
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


def check(name: str, found: Tensor, equations: Tensor) -> None:
    """Against the equations in plain torch; these and we against the authors' numbers, where there are some."""
    assert error(found, equations) < BOUND, name
    if name in NOMIC["expected"]:
        assert error(found, NOMIC["expected"][name]) < BOUND, name
        assert error(equations, NOMIC["expected"][name]) < BOUND, name


CONTEXT = plain.first_stage(W, *tokens("ctx"))
NULL = W["second_stage_model.sequence_dropout_null_embedding"]


def by_equations(name: str, context: Tensor, **how: Any) -> Tensor:
    """Mean-pooled states of the texts alone."""
    side = tokens(name)
    context = context.expand(len(side.input_ids), -1, -1) if context.ndim == 2 else context
    states = plain.second_states(W, *side, context[:, :6], **how)[:, 14:]
    mask = side.attention_mask[:, :, None]
    return (states * mask).sum(1) / mask.sum(1)


def test_first_stage() -> None:
    check("first_stage/ctx", encoder().first(tokens("ctx")), CONTEXT)


@pytest.mark.parametrize("width", [9, 12])
def test_several_vectors_of_a_document(width: int) -> None:
    """An empty slice of the padded length takes the whole text's sum over that length; padding tokens count nothing."""
    ids, mask = (F.pad(side, (0, width - 9)) for side in tokens("ctx"))
    parted = encoder(vectors_per_document=2)
    expected = plain.first_stage(W, ids[:3], mask[:3], 2)
    assert error(parted.first(Tokens(ids[:3], mask[:3])), expected) < BOUND
    short = Tokens(ids[1:3, :7], mask[1:3, :7])  # a slice of shorter documents, of a batch of this width
    assert error(parted.first(short, width), expected[2:]) < BOUND
    assert error(parted.first(short), expected[2:]) > 1e-3
    states = torch.arange(8.0).view(1, 4, 2)
    assert pool_parts(states, torch.tensor([[1, 1, 0, 0]]), 2, 4).tolist() == [[1.0, 2.0], [0.5, 1.0]]


def test_second_stage() -> None:
    made = encoder()
    context = made.first(tokens("ctx"))
    states = made.states(tokens("doc"), made.prefix(context))[:, 14:] * tokens("doc").attention_mask[:, :, None]
    of_equations = plain.second_states(W, *tokens("doc"), CONTEXT.expand(3, -1, -1))[:, 14:]
    check("second/doc_hidden", states, of_equations * tokens("doc").attention_mask[:, :, None])
    check("second/doc_mean_pooled", pool(states, tokens("doc").attention_mask, "mean"), by_equations("doc", CONTEXT))
    for name in ("doc", "q"):
        pooled = plain.head(W, by_equations(name, CONTEXT))
        check({"doc": "second/doc", "q": "full/q"}[name], made(tokens(name), context), pooled)
    nothing = plain.head(W, by_equations("doc", NULL.expand(6, -1)))
    check("second/doc_null_context", made(tokens("doc")), nothing)
    check("second/doc_null_context", made(tokens("doc"), NULL.expand(6, -1)), nothing)
    check(
        "second/doc_8ctx_truncated",
        made(tokens("doc"), torch.cat([context, context[:2]])),
        made(tokens("doc"), context),
    )
    of_two = plain.first_stage(W, tokens("ctx").input_ids[:3], tokens("ctx").attention_mask[:3], 2)
    check("second/doc_2tok", made(tokens("doc"), of_two), plain.head(W, by_equations("doc", of_two)))
    no_residual = plain.head(W, by_equations("doc", CONTEXT), residual=False)
    check("second/doc_v1_head", encoder(head="plain")(tokens("doc"), context), no_residual)
    check("second/doc_mean_pooled", encoder(head="none")(tokens("doc"), context), by_equations("doc", CONTEXT))


def test_pooling_and_positions() -> None:
    doc, mask = tokens("doc"), tokens("doc").attention_mask
    whole = plain.second_states(W, *doc, CONTEXT.expand(3, -1, -1))
    every = torch.cat([torch.ones(3, 14), mask], 1)[:, :, None]
    expected = plain.head(W, (whole * every).sum(1) / every.sum(1))
    check("second/doc_pool_all_tokens", encoder(pool="all")(doc, CONTEXT), expected)
    kept = mask.clone()
    kept[0, :3] = 0  # its third token ends an instruction; the last row begins with none, and has one inside
    kept[2, :3] = 0
    assert doc.input_ids[0, 2] == COLON and doc.input_ids[2, 2] == COLON and not (doc.input_ids[1] == COLON).any()
    after = kept[:, :, None]
    expected = plain.head(W, (whole[:, 14:] * after).sum(1) / after.sum(1))
    check("second/doc_pool_no_instruction", encoder(pool="after_instruction")(doc, CONTEXT), expected)
    expected = plain.head(W, by_equations("doc", CONTEXT, ordered=True))
    check("second/doc_ctx_positions_on", encoder(positions="consecutive")(doc, CONTEXT), expected)


@pytest.mark.parametrize("each_row", [False, True])
def test_sequence_dropout(each_row: bool) -> None:
    """Context vectors give way to the null vector, the same ones for all texts or others for each."""
    made, shape = encoder(), (3, 6) if each_row else (6,)
    null = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    assert null.any() and not null.all()
    context = CONTEXT.expand(3, -1, -1) if each_row else CONTEXT
    expected = plain.head(W, by_equations("doc", torch.where(null[..., None], NULL, context)))
    check("", made.text(tokens("doc"), made.prefix(context, null)), expected)


def test_the_order_of_the_context_is_nothing() -> None:
    made = encoder()
    whole = made(tokens("doc"), CONTEXT)
    assert float((made(tokens("doc"), CONTEXT[[3, 0, 5, 1, 4, 2]]) - whole).detach().abs().max()) < 1e-12
    ordered = encoder(positions="consecutive")
    assert error(ordered(tokens("doc"), CONTEXT[[3, 0, 5, 1, 4, 2]]), ordered(tokens("doc"), CONTEXT)) > 1e-3


def test_too_few_vectors_are_refused() -> None:
    """With fewer, the reference gives soft prompts the position of the context without a word."""
    with pytest.raises(ValueError, match="a text is read with 6 context vectors; found 4"):
        encoder()(tokens("doc"), CONTEXT[:4])


def test_loss_and_gradients_of_both_stages() -> None:
    made = encoder()
    context = made.first(tokens("ctx"))
    query, document = (F.normalize(made(tokens(name), context), dim=-1) for name in ("q", "doc"))
    loss = F.cross_entropy(query @ document.T * 50, torch.arange(3))
    assert error(loss, NOMIC["expected"]["full/loss"]) < BOUND
    loss.backward()
    found = {name: parameter.grad for name, parameter in made.named_parameters()}
    for name, expected in as_ours(NOMIC["gradient"]).items():
        grad = found[name]
        assert grad is not None and error(grad, expected) < BOUND, name
    detached = encoder()
    query, document = (F.normalize(detached(tokens(name), CONTEXT), dim=-1) for name in ("q", "doc"))
    F.cross_entropy(query @ document.T * 50, torch.arange(3)).backward()
    assert all(p.grad is None for name, p in detached.named_parameters() if name.startswith("first_"))
    assert all(p.grad is not None for name, p in made.named_parameters() if name.startswith("first_"))


def test_what_the_stock_model_adds_to_a_prefix_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: with the embedding of the token type on the context, the numbers are others."""
    monkeypatch.setattr("toolkit.models.contextual.without_own_embeddings", lambda model, prefix: prefix)
    assert error(encoder()(tokens("doc"), CONTEXT), NOMIC["expected"]["second/doc"]) > 1e-2


# --------------------------------------------------------------------------- a causal model, read both ways


def causal(context: int, **changes: Any) -> ContextualEncoder:
    config = LlamaConfig(
        vocab_size=89, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=128, rms_norm_eps=1e-6, pad_token_id=2,
        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    keys = {"size": context, "max_tokens": 9, "form": "flattened", "positions": "consecutive", "head": "plain"}
    pooling = changes.pop("pooling", "mean")
    made = ContextualEncoder(
        LlamaModel(config), backbone(), ContextSettings(**keys, width=32, **changes), pooling, False
    ).double()
    state = {ours_of_llama(name): value for name, value in LLAMA["weights"].items()}
    missing, unexpected = made.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("first_") for name in missing)
    return made


def ours_of_llama(name: str) -> str:
    for theirs, own in {
        "backbone.model.": "backbone.",
        "prompt_projection.": "prompts.",
        "output_projection.": "head.",
    }.items():
        name = name.replace(theirs, own)
    return name


def causal_by_equations(ids: Tensor, mask: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """States of the prefix and the texts after it, and which of them are no padding."""
    weights = LLAMA["weights"]
    prefix = plain.flattened_prefix(weights, context.expand(len(ids), -1, -1), 48)
    joined = torch.cat([prefix, weights["backbone.model.embed_tokens.weight"][ids]], 1)
    whole = torch.cat([torch.ones(prefix.shape[:2], dtype=mask.dtype), mask], 1)
    return plain.llama(plain.below(weights, "backbone.model."), joined, whole, 4, 2, 10000.0), whole


@pytest.mark.parametrize("pooling", ["mean", "last_token", "mean_weighted"])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("vectors", [5, 4])
def test_flattened_prefix(pooling: str, everything: bool, vectors: int) -> None:
    """5 + 8 vectors of 32 numbers are filled up to 9 of 48; 4 + 8 fit into 8 and get a whole vector of ones."""
    given = LLAMA["given"]
    side, context = Tokens(given["ids"], given["mask"]), given["ctx"][:vectors]
    keys: dict[str, Any] = {"pool": "all" if everything else "text", "position_weights": pooling == "mean_weighted"}
    made = causal(vectors, pooling="eos" if pooling == "last_token" else "mean", **keys)
    states, mask = causal_by_equations(*side, context)
    before = states.shape[1] - side.input_ids.shape[1]
    assert before == 9
    own = made.states(side, made.prefix(context))
    assert error(own * mask[:, :, None], states * mask[:, :, None]) < BOUND
    if not everything:
        states, mask = states[:, before:], side.attention_mask
    weights = mask * mask.cumsum(1) if pooling == "mean_weighted" else mask
    pooled = (states * weights[:, :, None]).sum(1) / weights.sum(1)[:, None]
    if pooling == "last_token":
        pooled = states[torch.arange(3), mask.sum(1) - 1]
    expected = plain.two_layers(LLAMA["weights"], "output_projection", pooled, "relu")
    found = made(side, context)
    assert error(found, expected) < BOUND
    name = f"ar/{pooling}/ignore_ctx_{int(not everything)}"
    if vectors == 5 and name in LLAMA["expected"]:
        assert error(found, LLAMA["expected"][name]) < BOUND
        hidden = LLAMA["expected"]["ar/hidden"] * side.attention_mask[:, :, None]
        assert error(own[:, before:] * side.attention_mask[:, :, None], hidden) < BOUND


def test_a_causal_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: with a mask of two dimensions the stock model would read from left to right."""
    given = LLAMA["given"]
    monkeypatch.setattr("toolkit.models.both_ways.CAUSAL_TYPES", ())
    found = causal(5)(Tokens(given["ids"], given["mask"]), given["ctx"])
    assert error(found, LLAMA["expected"]["ar/mean/ignore_ctx_1"]) > 1e-2
