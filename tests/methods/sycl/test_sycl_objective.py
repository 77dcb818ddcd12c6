"""The SyCL objective in one process: its sum of losses, its log, narrow vectors; and what its recipe is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_listwise import PLAIN
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tiny import make_recipe, save_model, stage_of
from tiny_retriever import small_model
from torch import Tensor, nn

from toolkit.data.graded import GradedBatch
from toolkit.data.tokens import Tokens
from toolkit.methods.objective import Loss
from toolkit.methods.sycl.keys import KEYS
from toolkit.methods.sycl.objective import Sycl
from toolkit.prepare.start_settings import resolve

QUERIES, SIZE, DIM = 8, 4, 12
EVERY = {"wasserstein": 1.0, "kl": 0.1, "infonce": 0.3, "wasserstein_per_query": 2.0}
OTHER = {"kl": 1.0, "infonce": 1.0}


class Table(nn.Module):
    """An encoder whose vectors are given: row i of the table for the text [i]."""

    normalize = False

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, tokens: Tokens) -> Tensor:
        return self.rows[tokens.input_ids[:, 0]]


def texts(first: int, last: int) -> Tokens:
    rows = torch.arange(first, last)[:, None]
    return Tokens(rows, torch.ones_like(rows))


def batch_of(grade: Tensor) -> GradedBatch:
    rows = len(grade)
    return GradedBatch(texts(0, rows), texts(rows, rows * (1 + grade.shape[1])), grade)


def stage(**changes: Any) -> Any:
    return stage_of("sycl", lora=None, **changes)


def objective(vectors: Tensor, **changes: Any) -> Sycl:
    made = stage(**changes)
    return Sycl(Table(vectors), made.objective, made.batch)  # pyright: ignore[reportArgumentType]


def vectors_and_grades(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    grade = torch.stack([torch.randperm(SIZE) for _ in range(QUERIES)]).float()
    return torch.randn(QUERIES * (1 + SIZE), DIM, dtype=torch.float64).to(dtype), grade


def value(loss: Loss, name: str) -> float:
    total, count = loss.parts[name]
    return float(total / count)


def test_the_sum_of_losses_its_gradient_and_its_log() -> None:
    vectors, grade = vectors_and_grades()
    how = {"label_scale": 1.5, "in_batch_grade": 0.25}
    made = objective(vectors, objective__losses=EVERY, **{f"objective__{key}": x for key, x in how.items()})
    loss = made(batch_of(grade))
    loss.total.backward()
    plain = vectors.clone().requires_grad_()
    scores = plain[:QUERIES] @ plain[QUERIES:].T
    losses = {name: PLAIN[name](scores, grade, 0.2, **({} if name == "infonce" else how)) for name in EVERY}
    total = sum(weight * losses[name] for name, weight in EVERY.items())
    assert isinstance(total, Tensor)
    total.backward()
    gradient = made.encoder.rows.grad
    assert isinstance(gradient, Tensor) and plain.grad is not None
    assert abs(float(loss.total.detach() - total.detach())) < 1e-9 * abs(float(total.detach()))
    assert float((gradient - plain.grad).abs().max()) < 1e-9 * float(plain.grad.abs().max())
    for name in EVERY:
        assert abs(value(loss, name) - float(losses[name].detach())) < 1e-6
    assert set(loss.parts) == {*EVERY, "accuracy", "pair_order", "padding"}
    assert set(objective(vectors)(batch_of(grade)).parts) == {"wasserstein", "accuracy", "pair_order", "padding"}


def test_accuracy_and_order_by_hand() -> None:
    grade = torch.tensor([[3.0, 1, 3], [2, 1, 0], [0, 0, 0]])
    scores = torch.zeros(3, 9)
    scores[0, 0:3] = torch.tensor([0.1, 0.2, 0.9])  # the best of two of grade 3; 1 of 2 pairs in order
    scores[1, 3:6] = torch.tensor([0.8, 0.9, 0.1])  # grade 1 above grade 2; 2 of 3 pairs in order
    scores[2, 0], scores[2, 6] = 0.9, 0.5  # another query's passage is above it; no pairs
    table = torch.cat([scores, torch.eye(9)])
    loss = objective(table)(batch_of(grade))
    assert value(loss, "accuracy") == pytest.approx(1 / 3)
    assert value(loss, "pair_order") == pytest.approx(3 / 5)
    alike = objective(table)(batch_of(torch.ones(3, 3)))
    assert value(alike, "pair_order") == 0.0  # the log divides by the number of pairs


def test_narrow_vectors_have_wide_scores() -> None:
    """Vectors in bf16, also under autocast: the loss is that of the same vectors in fp32."""
    vectors, grade = vectors_and_grades(torch.bfloat16)
    wide = objective(vectors.float(), objective__losses=EVERY)(batch_of(grade)).total
    for autocast in (False, True):
        made = objective(vectors.clone(), objective__losses=EVERY)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = made(batch_of(grade)).total
        assert torch.equal(found, wide)
        found.backward()
        assert made.encoder.rows.grad.dtype == torch.bfloat16  # pyright: ignore
    rounded = objective(vectors.float(), objective__losses=EVERY)
    with torch.autocast("cpu", torch.bfloat16):
        scores = rounded.encoder.rows[:QUERIES] @ rounded.encoder.rows[QUERIES:].T  # pyright: ignore
        with pytest.raises(ValueError, match=r"scores are torch\.bfloat16"):
            rounded.losses(scores, grade, 0)


# --------------------------------------------------------------------------- the recipe


def problems(**changes: Any) -> list[str]:
    return [f"{at}: {what}" for at, what in KEYS.check("stages.0", stage(**changes), True)]


def test_what_does_not_fit_together_is_said() -> None:
    first = {"size": 4, "by": "positive_first"}
    assert problems() == []
    assert problems(objective__losses=OTHER, data__group=first) == []
    assert problems(objective__losses={}) == [
        'stages.0.objective.losses: names no loss; write e.g. {"wasserstein": 1.0, "kl": 0.1}'
    ]
    assert problems(objective__losses=OTHER) == [
        'stages.0.data.group.by: infonce takes the first passage of a group as positive; write "positive_first"'
    ]
    assert problems(data__group=first) == [
        "stages.0.data.group.by: only infonce reads a positive first; write another, or add infonce to losses"
    ]
    alone = {"objective__losses": {"infonce": 1.0}, "data__group": first}
    no_effect = "has no effect on infonce, which reads no grades; remove it"
    assert problems(**alone, objective__label_scale=2.0, objective__in_batch_grade=1.0) == [
        f"stages.0.objective.label_scale: {no_effect}",
        f"stages.0.objective.in_batch_grade: {no_effect}",
    ]


def told(folder: str, *before: dict[str, Any], **changes: Any) -> list[str]:
    """The remarks on the last of some stages that begin with the model of a folder."""
    encoder = {"pooling": "mean", "normalize": True, "query_prefix": "", "passage_prefix": "", "max_tokens": 16}
    raw = stage(**changes).model_dump(mode="json") | {"encoder": encoder | {"eval_max_tokens": 16}}
    stages = [*(raw | each for each in before), raw]
    stages = [each | {"name": f"s{i}", "start": "previous"} for i, each in enumerate(stages)]
    stages[0] = stages[0] | {"start": {"folder": folder}}
    resolved = resolve(make_recipe(*stages), len(stages) - 1)
    return [line for line in resolved.notes if "wasserstein" in line]


REMARK = (
    "warning: stages.{0}.objective.losses: wasserstein alone does not know which passages are of which query, so it "
    'only refines a retriever, and {1}; add "kl": 0.1, or put a stage with kl before this one'
)
NAMES_NONE = "that names no pooling, so that nothing tells whether it was ever a retriever"


def test_the_published_loss_alone_wants_a_retriever_to_start_from(tmp_path: Path) -> None:
    language_model = str(save_model(tmp_path / "llama", "llama"))
    is_lm = "the start model is a language model (LlamaForCausalLM)"
    assert told(language_model) == [REMARK.format(0, is_lm)]
    assert told(language_model, objective__losses={"wasserstein": 1.0, "kl": 0.1}) == []
    assert told(language_model, objective__losses={"wasserstein": 1.0, "wasserstein_per_query": 1.0}) == []
    warm_up = stage(objective__losses={"kl": 1.0}).model_dump(mode="json")
    assert told(language_model, {"objective": warm_up["objective"]}) == []
    trained = json.loads((Path(__file__).parents[3] / "recipes" / "tiny" / "contrastive.json").read_text())["stages"][0]
    assert trained["objective"]["name"] == "language_model"
    before = {key: trained[key] for key in ("objective", "data", "batch")}
    assert told(language_model, before) == [REMARK.format(1, "the stage before trains a language model")]


def test_what_a_folder_says_of_its_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "bert", "bert")
    assert told(str(folder)) == [REMARK.format(0, f"the start model is one {NAMES_NONE}")]
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"architectures": ["Contriever"]}))  # a retriever's own class
    assert told(str(folder)) == []
    path.write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    assert told(str(folder)) == [REMARK.format(0, "the start model is a language model (BertForMaskedLM)")]
    path.write_text(json.dumps({key: x for key, x in config.items() if key != "architectures"}))
    assert told(str(folder)) == [REMARK.format(0, f"the start model is one {NAMES_NONE}")]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    (adapter / "adapter_model.safetensors").touch()
    assert told(str(adapter)) == [REMARK.format(0, f"the start model is an adapter {NAMES_NONE}")]


def test_a_sentence_transformers_model_is_a_retriever(tmp_path: Path) -> None:
    base = small_model("bert", tmp_path / "base", "wordpiece")
    made = SentenceTransformer(modules=[Transformer(str(base), max_seq_length=24), Pooling(32, "mean")], device="cpu")
    made.save(str(tmp_path / "model"))
    assert told(str(base)) != [] and told(str(tmp_path / "model")) == []
