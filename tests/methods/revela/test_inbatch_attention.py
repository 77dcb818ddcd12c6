"""In-batch attention in every supported model type against the dense form; what is refused."""

from pathlib import Path

import pytest
import torch
from reference import NAME, revela_loss
from tiny import TARGETS, build_objective, random_pools, revela_stage, save_model
from torch import Tensor
from transformers import AutoConfig

import toolkit.slicing
from toolkit.methods.revela.objective import Revela
from toolkit.models.backbone import CAUSAL_TYPES, add_lora, load_causal_lm, read_config
from toolkit.models.lengths import check_window


@pytest.mark.parametrize("kind", CAUSAL_TYPES)
def test_every_supported_type_equals_the_dense_form(kind: str, tmp_path: Path) -> None:
    """Loss and gradients of the whole objective, sliced and with recomputed layers, against one dense forward."""
    folder, lm_folder = save_model(tmp_path / "a", kind, 1), save_model(tmp_path / "b", kind, 2)
    stage = revela_stage(
        lora=None, objective__language_model__lora=None, batch__forward_rows=3, activation_checkpointing=True
    )
    pools = random_pools(1, 8)
    objective = build_objective(stage, 0, "cpu", folder, None, lm_folder)  # pyright: ignore
    objective(pools[0]).total.backward()
    plain = build_objective(stage, 0, "cpu", folder, None, lm_folder)  # pyright: ignore
    plain.language_model.causal_lm = load_causal_lm(lm_folder, torch.float32, NAME)
    expected = revela_loss(plain.encoder, plain.language_model.causal_lm, pools, stage.objective)  # pyright: ignore
    expected.backward()
    found = {name: p.grad for name, p in objective.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None, name
        assert float((found[name] - parameter.grad).abs().max() / parameter.grad.abs().max()) < 1e-5, name


def test_lora_dropout_is_replayed_in_slices_and_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed slices and layers give the gradient of the same slices with their activations kept."""
    folder = save_model(tmp_path / "a", "llama", 1)
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.3, "targets": TARGETS}
    changes = {"lora": lora, "objective__language_model__lora": lora, "batch__forward_rows": 3}

    def gradients(recompute_layers: bool) -> dict[str, Tensor]:
        stage = revela_stage(**changes, activation_checkpointing=recompute_layers)
        objective = build_objective(stage, 0, "cpu", folder, None, folder)  # pyright: ignore
        for name, parameter in objective.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(7))
        torch.manual_seed(9)
        objective(random_pools(1, 8)[0]).total.backward()
        return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}

    recomputed, layers_too = gradients(False), gradients(True)
    checkpoint = toolkit.slicing.checkpoint
    monkeypatch.setattr(toolkit.slicing, "checkpoint", lambda fn, *part, **_: fn(*part))
    expected = gradients(False)

    def gap(found: dict[str, Tensor]) -> float:
        return max(float((found[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in expected)

    assert len(expected) > 8 and gap(recomputed) < 1e-6 and gap(layers_too) < 1e-6
    monkeypatch.setattr(
        toolkit.slicing,
        "checkpoint",
        lambda fn, *part, **_: checkpoint(fn, *part, use_reentrant=False, preserve_rng_state=False),
    )
    assert gap(gradients(False)) > 0.1


def test_unsupported_type_names_those_that_are(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, vocab_size=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'gpt2' is not supported; use one of llama, mistral, qwen2, qwen3"):
        read_config(tmp_path)


def test_short_sliding_window_is_refused(tmp_path: Path) -> None:
    for kind, used in (("mistral", {}), ("qwen2", {"use_sliding_window": True})):
        config = AutoConfig.for_model(kind, sliding_window=64, **used)
        check_window(config, 64)
        with pytest.raises(ValueError, match="sliding window of 64"):
            check_window(config, 65)
    check_window(AutoConfig.for_model("qwen2", sliding_window=64), 65)


def test_targets_that_match_nothing_are_listed(tmp_path: Path) -> None:
    model = load_causal_lm(save_model(tmp_path / "m", "llama"), torch.float32, "sdpa")
    with pytest.raises(ValueError, match=r"c_attn match no module; the model has .*q_proj"):
        add_lora(model, 4, 8, 0.0, ["q_proj", "c_attn"], True, 0)


def test_a_document_reads_the_others_only(tmp_path: Path) -> None:
    """With one other passage every weight is 1 whatever the similarity; the own passage never counts."""
    folder = save_model(tmp_path / "m", "llama")
    stage = revela_stage(lora=None, objective__language_model__lora=None)
    objective: Revela = build_objective(stage, 0, "cpu", folder, None, folder)  # pyright: ignore
    q = torch.nn.functional.normalize(torch.randn(5, 6), dim=-1)
    w = objective.weights(q, q)
    assert torch.equal(w.diagonal(), torch.zeros(5)) and torch.allclose(w.sum(1), torch.ones(5))
    assert torch.equal(objective.weights(q[:2], q[:2]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
