"""The language_model objective on two ranks equals transformers' own logits; how many chunks its logits come in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_on_ranks
from pairwise import BOUNDS, pairwise
from tiny import TARGETS, VOCABULARY, build_objective, random_pools, revela_stage, save_model
from torch import Tensor

import toolkit.losses.language
from toolkit.methods.shared import logit_chunks
from toolkit.recipe.stage import Stage

FACTORS = {
    "zero": [0, 1, 2, 3],
    "max_logits": [2**27, 3 * VOCABULARY],  # one chunk, and up to 38 that are of three tokens or empty
    "arch": ["tied", "untied"],
    "forward": [{}, {"batch__forward_rows": 3}, {"batch__forward_tokens": 30}],
    "span": ["rank", "world"],
    "layers": [False, True],
}


def exact(answer: dict[str, float]) -> bool:
    return all(answer[figure] <= bound for figure, bound in BOUNDS.items())


def test_equals_whole_logits_on_two_ranks(tmp_path: Path) -> None:
    folders = {name: str(save_model(tmp_path / name, "llama", tie=name == "tied")) for name in FACTORS["arch"]}
    cases = []
    for case in pairwise(FACTORS):
        changes = {"zero__stage": case["zero"], "batch__span": case["span"], "activation_checkpointing": case["layers"]}
        cases.append({"arch": case["arch"], "max_logits": case["max_logits"], "changes": changes | case["forward"]})
    mistake = {"arch": "tied", "max_logits": 2**27, "changes": {"batch__span": "world"}, "control": "own_mean"}
    request = {"folders": folders, "cases": [*cases, mistake]}
    *answers, wrong = run_on_ranks("language_matrix.py", 2, request, tmp_path)
    for case, answer in zip(cases, answers, strict=True):
        assert answer["smallest_array"] > 0 and exact(answer), (case, answer)
    assert not exact(wrong)


def language_model_stage(**changes: Any) -> Stage:
    return revela_stage(lora=None, objective={"name": "language_model", "max_tokens": 32}, batch__pool=64, **changes)


def test_chunks_follow_from_the_recipe_alone() -> None:
    """1,000 x 128 Ki logits are 0.98 of a chunk; the 64 rows of a pool have at most 2,048 tokens."""

    def chunks(**changes: Any) -> int:
        return logit_chunks(language_model_stage(**changes), 32, 2**17)

    assert chunks() == chunks(batch__forward_rows=100) == chunks(batch__forward_tokens=10**6) == 2
    assert chunks(batch__forward_rows=32) == 1 and chunks(batch__forward_rows=33) == 2
    assert chunks(batch__forward_tokens=1024) == 1 and chunks(batch__forward_tokens=1025) == 2
    assert logit_chunks(language_model_stage(batch__forward_tokens=8), 2048, 2**17) == 2  # one long row runs alone


@pytest.mark.parametrize("forward", [{}, {"batch__forward_tokens": 40}], ids=["all", "slices"])
def test_adapters_may_sit_on_the_head(tmp_path: Path, forward: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "llama", "llama")
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": [*TARGETS, "lm_head"]}
    stage = revela_stage(objective__language_model__lora=lora, objective__dual_loss=True, **forward)

    def gradients(head_seed: int) -> dict[str, Tensor]:
        objective = build_objective(stage, 3, "cpu", folder, None, folder)  # pyright: ignore
        for name, parameter in objective.named_parameters():
            if "lora_B" in name:
                seed = head_seed if "lm_head" in name else 7
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
        objective(random_pools(1, 8)[0]).total.backward()
        assert (objective.language_model.logit_chunks > 1) == (toolkit.losses.language.MAX_LOGITS < 2**27)
        return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}

    whole = gradients(7)
    monkeypatch.setattr(toolkit.losses.language, "MAX_LOGITS", 3 * VOCABULARY)
    chunked, other = gradients(7), gradients(8)
    assert sum("lm_head.lora" in name for name in whole) == 2 and whole.keys() == chunked.keys()
    for name, expected in whole.items():
        size = expected.abs().max()
        assert (chunked[name] - expected).abs().max() < 1e-5 * size, name
        assert (other[name] - expected).abs().max() > 1e-2 * size, name  # the chunks go through the head's adapter
