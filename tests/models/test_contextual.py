"""The contextual encoder around every type of backbone: what the context does, shared prefixes, adapters, files."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contextual import CAUSAL, TARGETS, context_keys, save_backbone
from fp64 import fp64_inside
from peft import PeftModel
from tiny import random_tokens
from torch import Tensor
from transformers import AutoConfig

from toolkit.data.tokens import Tokens
from toolkit.models.backbone import add_lora, load_encoder_backbone
from toolkit.models.contextual import ContextualEncoder, check_form
from toolkit.models.contextual_files import is_contextual, load_contextual, read_context, write_context
from toolkit.models.two_adapters import FIRST, add_first, same_adapter, through
from toolkit.recipe.context import ContextSettings
from toolkit.recipe.errors import RecipeError

ENCODERS = ("nomic_bert", "modernbert", "bert", "roberta", "distilbert")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_backbone(root / kind, kind, seed) for seed, kind in enumerate((*ENCODERS, *CAUSAL))}


def backbone(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    return load_encoder_backbone(folder, dtype)


def encoder(folder: Path, kind: str, pooling: str = "mean", share: bool = True, **changes: Any) -> ContextualEncoder:
    torch.manual_seed(1)
    settings = ContextSettings(**context_keys(kind, **changes))
    made = ContextualEncoder(
        backbone(folder), backbone(folder), settings, pooling, True, instruction_end=7, share_prefix=share
    )
    return made.double().eval()


def texts(seed: int = 0, rows: int = 5) -> Tokens:
    return random_tokens(rows, torch.Generator().manual_seed(seed))


def one_by_one(side: Tokens) -> list[Tokens]:
    """Each text as it is without the others' padding."""
    lengths = side.attention_mask.sum(1).tolist()
    return [Tokens(*(t[i : i + 1, :length] for t in side)) for i, length in enumerate(lengths)]


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("kind", [*ENCODERS, *CAUSAL])
def test_the_order_of_the_context_changes_nothing_and_its_vectors_do(kind: str, folders: dict[str, Path]) -> None:
    with fp64_inside():
        made = encoder(folders[kind], kind)
        context = made.first(texts(1, 10))
        whole = made(texts(), context)
        order = torch.randperm(10, generator=torch.Generator().manual_seed(2))
        assert gap(made(texts(), context[order]), whole) < (1e-12 if kind not in ("mistral", "qwen2") else 1e-6)
        other = context.clone()
        other[9] = made.first(texts(3, 1))[0]
        assert float((made(texts(), other) - whole).detach().abs().amax(1).min()) > 1e-6  # every text reads it
        assert gap(made(texts()), whole) > 1e-4
        null = torch.ones(10, dtype=torch.bool)
        assert gap(made.text(texts(), made.prefix(context, null)), made(texts())) == 0


@pytest.mark.parametrize("kind", [*ENCODERS, *CAUSAL])
def test_padding_and_neighbours_change_nothing(kind: str, folders: dict[str, Path]) -> None:
    with fp64_inside():
        made = encoder(folders[kind], kind)
        documents, side = texts(1, 10), texts()
        alone = [
            Tokens(*(t[i : i + 1, : int(documents.attention_mask[i].sum())] for t in documents)) for i in range(10)
        ]
        context = torch.cat([made.first(document) for document in alone])
        near = 1e-12 if kind not in ("mistral", "qwen2") else 1e-6
        assert gap(made.first(documents), context) < near
        assert gap(torch.cat([made(one, context) for one in one_by_one(side)]), made(side, context)) < near


def test_texts_of_a_model_with_learned_positions_keep_them(folders: dict[str, Path]) -> None:
    """However long the context: 64 positions are there, and it has 90 vectors."""
    made = encoder(folders["bert"], "bert", size=90)
    found = made(texts(), torch.randn(90, 32, dtype=torch.float64))
    assert found.isfinite().all()
    swapped = Tokens(texts().input_ids[:, [1, 0, *range(2, texts().input_ids.shape[1])]], texts().attention_mask)
    assert gap(made(swapped), made(texts())) > 1e-4


def test_local_layers_read_the_whole_context(folders: dict[str, Path]) -> None:
    """ModernBERT's window here is 4 tokens to each side; the text's own stays."""
    made = encoder(folders["modernbert"], "modernbert", size=40)
    seen: list[Tensor] = []
    layer = made.backbone.get_submodule("layers.1")
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    side = texts()
    made(side)
    mask, length = seen[0][0, 0], side.input_ids.shape[1]
    assert mask.shape == (48 + length, 48 + length)
    assert bool(mask[48:, :48].all()) and bool(mask[:48, 48 : 48 + int(side.attention_mask[0].sum())].all())
    near = (torch.arange(length)[:, None] - torch.arange(length)[None]).abs() <= 4
    assert torch.equal(mask[48:, 48:], near & (side.attention_mask[0] > 0))


# --------------------------------------------------------------------------- one prefix for all texts


def with_gradients(made: ContextualEncoder) -> tuple[Tensor, dict[str, Tensor]]:
    made.train()
    found = made(texts(), made.first(texts(1, 10)))
    (found * torch.randn(found.shape, generator=torch.Generator().manual_seed(4), dtype=found.dtype)).sum().backward()
    return found.detach(), {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_shared_prefix_gives_the_same_numbers(kind: str, recomputed: bool, folders: dict[str, Path]) -> None:
    near = 1e-11 if kind not in ("mistral", "qwen2") else 2e-6  # whose norms are in fp32
    with fp64_inside():
        shared = encoder(folders[kind], kind, "eos")
        apart = encoder(folders[kind], kind, "eos", share=False)
        if recomputed:
            shared.backbone.activation_checkpointing_enable({"use_reentrant": False})  # pyright: ignore
        assert shared.share_prefix and not apart.share_prefix
        (found, gradients), (expected, of_apart) = with_gradients(shared), with_gradients(apart)
    assert gap(found, expected) < near and gradients.keys() == of_apart.keys()
    for name, gradient in of_apart.items():
        assert gap(gradients[name], gradient) < near * float(gradient.abs().max()) + 1e-12, name


def test_a_text_after_a_prefix_is_causal(folders: dict[str, Path]) -> None:
    with fp64_inside():
        made = encoder(folders["llama"], "llama", "eos")
        side = Tokens(torch.randint(3, 90, (1, 8)), torch.ones(1, 8, dtype=torch.int64))
        states = made.states(side, made.prefix())
        other = Tokens(side.input_ids.clone(), side.attention_mask)
        other.input_ids[0, 5] = (other.input_ids[0, 5] + 1) % 80 + 3
        changed = made.states(other, made.prefix())
    assert gap(changed[:, :5], states[:, :5]) == 0 and gap(changed[:, 5:], states[:, 5:]) > 1e-3


def test_projected_vectors_have_the_norm_of_embeddings(folders: dict[str, Path]) -> None:
    made = encoder(folders["llama"], "llama", "eos", share=False)
    norms = made.backbone.get_input_embeddings().weight.detach().norm(dim=1)  # pyright: ignore
    expected = float(norms[norms > 0].mean())
    assert made.prefix(torch.randn(10, 32).double()).norm(dim=-1).tolist() == pytest.approx([expected] * 18, rel=1e-6)


# --------------------------------------------------------------------------- two adapters of one backbone


def adapted(folder: Path, kind: str) -> PeftModel:
    model = add_lora(backbone(folder), 4, 8.0, 0.0, TARGETS[kind], False, seed=1)
    add_first(model, model.peft_config["default"], seed=2)  # pyright: ignore
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_both_adapters_are_trained_and_only_one_runs(folders: dict[str, Path]) -> None:
    model = adapted(folders["llama"], "llama").double()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    side = texts()._asdict()
    second = model(**side).last_hidden_state
    with through(model, FIRST):
        first = model(**side).last_hidden_state
    assert gap(first, second) > 1e-2 and gap(model(**side).last_hidden_state, second) == 0
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with pytest.raises(RuntimeError), through(model, FIRST):
        raise RuntimeError
    assert gap(model(**side).last_hidden_state, second) == 0


def test_a_recomputed_layer_runs_through_the_adapter_that_it_ran_through(folders: dict[str, Path]) -> None:
    """Without that the first stage's gradients would be those of the second's adapter, which runs last."""

    def gradients(prepare: Callable[[Any], None]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = adapted(folders["llama"], "llama").double()
        prepare(model)
        settings = ContextSettings(**context_keys("llama"))
        return with_gradients(ContextualEncoder(model, None, settings, "eos", True).double())[1]

    def recompute(model: Any, **options: Any) -> None:
        model.activation_checkpointing_enable({"use_reentrant": False} | options)

    with fp64_inside():
        expected = gradients(lambda model: None)
        found = gradients(lambda model: recompute(model, context_fn=same_adapter(model)))
        names = [name for name in expected if f".{FIRST}." in name]
        assert names and found.keys() == expected.keys()
        assert all(gap(found[name], expected[name]) < 1e-12 for name in expected)
        try:
            wrong = gradients(recompute)  # a control
        except Exception as error:
            assert "checkpoint" in str(error).lower()
        else:
            assert max(gap(wrong[name], expected[name]) for name in names if name in wrong) > 1e-6


# --------------------------------------------------------------------------- files and settings


def test_context_files_are_loaded_as_they_were(folders: dict[str, Path], tmp_path: Path) -> None:
    made = encoder(folders["nomic_bert"], "nomic_bert", pool="after_instruction", null_probability=0.1)
    state = {name: weight.detach() for name, weight in made.named_parameters()}
    made.first_backbone.save_pretrained(tmp_path / "first")  # pyright: ignore
    write_context(tmp_path, made, state, torch.float64)
    assert is_contextual(tmp_path) and not is_contextual(folders["bert"])
    assert read_context(tmp_path).settings == made.settings
    loaded = load_contextual(tmp_path, copy.deepcopy(made.backbone), "mean", True, torch.float64, "cpu")
    context = loaded.first(texts(1, 10))
    assert gap(loaded(texts(), context), made(texts(), made.first(texts(1, 10)))) == 0
    with pytest.raises(ValueError, match=r"the weights to export lack null\.weight"):
        write_context(tmp_path, made, {k: v for k, v in state.items() if k != "null.weight"}, torch.float64)
    (tmp_path / "context.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"context\.json: cannot be read"):
        read_context(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "pooling", "line"),
    [
        ("llama", {"form": "tokens"}, "eos", 'context.form: tokens is for encoders, and llama is causal; write "proj'),
        ("bert", {"form": "flattened"}, "mean", "context.form: flattened is for causal models, not bert"),
        ("llama", {"form": "flattened"}, "eos", "context.positions: flattened vectors stand at consecutive positions"),
        ("bert", {"positions": "consecutive"}, "mean", "context.positions: bert has positions for a text alone"),
        ("llama", {"positions": "consecutive"}, "eos", "context.positions: in a causal model a projected context has"),
        ("llama", {"pool": "all"}, "eos", "context.pool: all needs a text that is read both ways"),
        (
            "bert",
            {"pool": "after_instruction"},
            "cls",
            "context: pool after_instruction goes with encoder.pooling",
        ),
        ("bert", {"pool": "all"}, "cls", "context.pool: all with encoder.pooling cls would be a context vector"),
        ("bert", {"vectors_per_document": 3}, "mean", "context.vectors_per_document: 3 vectors a document do not make"),
        ("t5", {}, "mean", "context: t5 gives no token a position of its own; it can be the first stage alone"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(kind: str, changes: dict[str, Any], pooling: str, line: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_form(ContextSettings(**context_keys(kind, **changes)), AutoConfig.for_model(kind), pooling)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
