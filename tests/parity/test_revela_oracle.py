"""Revela against numbers that the authors' own code produced on tiny models (weights, inputs, losses, gradients).

error = max|a - b| / max|b| per array: 2e-5 in fp32; in fp64 1e-6, and 1e-9 with norms and rotary embedding in fp64 too.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fp64 import fp64_inside
from read_others import read_others
from tiny import revela_stage

from toolkit.data.tokens import Tokens
from toolkit.losses.language import num_predicted
from toolkit.methods.revela.inbatch_attention import INBATCH_ATTENTION, InBatchLanguageModel, Others
from toolkit.methods.revela.keys import RevelaObjective
from toolkit.methods.revela.objective import Revela
from toolkit.methods.revela.pool_memory import share_pool
from toolkit.methods.revela.read_pairs import keep, pair_up
from toolkit.methods.revela.rows import collate_revela
from toolkit.models.backbone import load_causal_lm, load_encoder_backbone, load_tokenizer
from toolkit.models.encoder import Encoder
from toolkit.slicing import in_slices, plan_slices

FIXTURES = Path(__file__).parent.parent / "fixtures" / "revela"
CASES = ["llama_pad_vnorm", "llama_pad_novnorm", "llama_pad_vnorm_tau1e-4"]


def error(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(found.detach().double().numpy() - expected).max() / np.abs(expected).max())


def load(case: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    with np.load(FIXTURES / f"{case}.npz") as arrays:
        parts = {
            kind: {k.split("/", 1)[1]: arrays[k] for k in arrays if k.startswith(kind)} for kind in ("input", "output")
        }
    return parts["input"], parts["output"]


def run(
    case: str, dtype: torch.dtype, rows: int | None, recompute: bool = False, **how: Any
) -> tuple[Any, dict[str, Any]]:
    """Loss, similarity gradient and parameters after the backward pass of one case, as the objective does it."""
    given, _ = load(case)
    causal_lm = load_causal_lm(FIXTURES / "reference", dtype, INBATCH_ATTENTION).train()
    if recompute:
        causal_lm.activation_checkpointing_enable({"use_reentrant": False})  # pyright: ignore
    model = InBatchLanguageModel(causal_lm, v_norm=how.get("v_norm", not bool(given["disable_v_norm"])))
    text = Tokens(torch.tensor(given["input_ids"]), torch.tensor(given["attention_mask"]))
    similarity = torch.tensor(given["sim"], dtype=dtype, requires_grad=True)
    itself = torch.eye(len(similarity), dtype=torch.bool)
    w = (similarity / float(given["attn_temperature"])).masked_fill(itself, float("-inf")).softmax(-1)
    dual = how.get("dual", False)
    slices = plan_slices(torch.ones_like(text.attention_mask), rows, None)  # of full width, as `memory` is
    kv, plain = in_slices(lambda t: model.keys_values(t, dual), slices, text)
    kept = keep(w.detach(), 0.0, None)
    kv = kv.detach() if how.get("detach") else kv
    memory, _ = share_pool(kv, text.attention_mask.sum(1), kept.any(0), "rank")
    nll = in_slices(lambda t, *pairs: model.row_nll(t, *pairs, memory), slices, text, w, kept)
    tokens = num_predicted(text.attention_mask)
    ((nll.sum() + plain.sum() * dual) / tokens).backward()
    found = {"revela_loss": nll.sum() / tokens, "seq_loss": plain.sum() / tokens, "grad_sim": similarity.grad}
    return causal_lm, found


def worst(case: str, causal_lm: Any, found: dict[str, Any], prefix: str = "grad.") -> float:
    _, expected = load(case)
    parameters = dict(causal_lm.named_parameters())
    errors = [error(found[name], expected[name]) for name in found if name in expected]
    errors += [error(parameters[k[len(prefix) :]].grad, expected[k]) for k in expected if k.startswith(prefix)]
    assert len(errors) >= 4
    return max(errors)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("case", CASES)
def test_fp32(case: str, rows: int | None, recompute: bool) -> None:
    assert worst(case, *run(case, torch.float32, rows, recompute)) < 2e-5


@pytest.mark.parametrize("case", CASES)
def test_fp64(case: str) -> None:
    assert worst(case, *run(case, torch.float64, 2)) < 1e-6
    with fp64_inside():
        assert worst(case, *run(case, torch.float64, 2)) < 1e-9


@fp64_inside()
def test_live_gradients_are_the_authors_and_detached_ones_are_not() -> None:
    causal_lm, found = run("llama_pad_vnorm", torch.float64, None, detach=True)
    assert worst("llama_pad_vnorm", causal_lm, {"detach_grad_sim": found["grad_sim"], **found}, "detach_grad.") < 1e-9
    assert worst("llama_pad_vnorm", causal_lm, {}, "grad.") > 0.01


@fp64_inside()
def test_dual_loss_adds_the_plain_gradient() -> None:
    name = "model.layers.0.self_attn.v_proj.weight"
    both, one = (dict(run(CASES[0], torch.float64, 2, dual=dual)[0].named_parameters())[name] for dual in (True, False))
    assert error(both.grad - one.grad, load(CASES[0])[1][f"seqgrad.{name}"]) < 1e-9


@pytest.mark.parametrize("change", [{"v_norm": False}, {"v_norm": True}])
def test_v_norm_matters(change: dict[str, bool]) -> None:
    case = CASES[0] if not change["v_norm"] else CASES[1]
    assert worst(case, *run(case, torch.float32, None, **change)) > 1e-2


@fp64_inside()
def test_logits_and_the_term_of_one_layer() -> None:
    given, expected = load(CASES[0])
    lengths = tuple(given["attention_mask"].sum(1).tolist())
    q, k, v, w = (torch.tensor(expected[name]) for name in ("q_l0", "k_l0", "v_l0", "weights"))
    terms = {v_norm: read_others(q, k, v, lengths, w, q.shape[-1] ** -0.5, v_norm) for v_norm in (True, False)}
    off = {v_norm: error(term.transpose(1, 2).flatten(2), expected["inbatch_out_l0"]) for v_norm, term in terms.items()}
    assert off[True] < 1e-9 and off[False] > 0.1
    causal_lm = load_causal_lm(FIXTURES / "reference", torch.float64, INBATCH_ATTENTION)
    model, text = InBatchLanguageModel(causal_lm, True), Tokens(*(torch.tensor(given[k]) for k in Tokens._fields))
    kept, length = keep(w, 0.0, None), text.attention_mask.sum(1)
    memory, _ = share_pool(model.keys_values(text, False).keys_values, length, kept.any(0), "rank")
    pairs = pair_up(w, kept, memory.place, length, memory.length)
    states = model._states(text, others=Others(memory, pairs, True))
    real = torch.tensor(given["attention_mask"]).bool()
    assert error(causal_lm.lm_head(states)[real], expected["logits"][real.numpy()]) < 1e-9  # pyright: ignore


@pytest.fixture
def texts() -> list[str]:
    return json.loads((FIXTURES / "texts.json").read_text())


@pytest.mark.parametrize("dual", [False, True])
def test_from_texts_to_gradients(texts: list[str], dual: bool) -> None:
    """The authors' collator, retriever, language model and loss, end to end (fp32)."""
    given, expected = load("e2e")
    stage = revela_stage(encoder__max_tokens=29, objective__dual_loss=dual, lora=None, batch__forward_rows=4)
    settings = stage.objective
    assert isinstance(settings, RevelaObjective) and settings.half_query
    tokenizer = load_tokenizer(FIXTURES / "tokenizer")
    batch = collate_revela(
        texts, np.zeros(len(texts), np.int64), tokenizer=tokenizer, lm_tokenizer=tokenizer, encoder=stage.encoder,
        half_query=True, lm_max_tokens=28, near_duplicates=None,
    )  # fmt: skip
    for side, theirs in (("query", "query"), ("passage", "passage"), ("text", "llm")):
        tokens: Tokens = getattr(batch, side)
        width = tokens.input_ids.shape[1]
        assert (tokens.attention_mask.numpy() == given[f"{theirs}.attention_mask"][:, :width]).all()
        assert (tokens.input_ids.numpy() == given[f"{theirs}.input_ids"][:, :width]).all()
        assert not given[f"{theirs}.attention_mask"][:, width:].any()
    encoder = Encoder(load_encoder_backbone(FIXTURES / "encoder", torch.float32), "eos", True)
    causal_lm = load_causal_lm(FIXTURES / "reference", torch.float32, INBATCH_ATTENTION)
    objective = Revela(encoder, InBatchLanguageModel(causal_lm, True), settings, stage.batch, None, stage.optim.steps)
    loss = objective(batch)
    loss.total.backward()
    prefix = "dual_" if dual else ""
    assert error(loss.total, expected[f"{prefix}loss"]) < 2e-5
    assert error(encoder(batch.query), expected["q_reps"]) < 2e-5
    assert error(encoder(batch.passage), expected["p_reps"]) < 2e-5
    compared = 0
    for kind, module in (("encoder", encoder.backbone), ("reference", causal_lm)):
        parameters = dict(module.named_parameters())
        for key, gradient in expected.items():
            if key.startswith(f"{prefix}{kind}_grad."):
                found = parameters[key.removeprefix(f"{prefix}{kind}_grad.")].grad
                assert found is not None and error(found, gradient) < 2e-5, key
                compared += 1
    assert compared == 8
