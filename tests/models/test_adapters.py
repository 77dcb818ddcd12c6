"""Adapters that other programs have trained: their vectors, what does not fit, and going on with them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_retriever import CARD, ENCODERS, TARGETS, TEXTS, small_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    T5EncoderModel,
)

from toolkit.export.write import load_export, write_export
from toolkit.models.adapters import with_adapter
from toolkit.models.backbone import adapted, load_adapted, load_encoder_backbone, load_tokenizer, read_config
from toolkit.models.encoder import Encoder
from toolkit.prepare.models import ModelSource
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.evaluation import EvalSettings
from toolkit.recipe.models import EncoderSettings, Lora
from toolkit.retrieval.embed import Retriever, embed_texts
from toolkit.retrieval.retrievers import load_any

IDS = torch.tensor([[5, 90, 31, 7, 12, 11]])
CAUSAL = {"llama": "plain", "mistral": "plain", "qwen2": "plain", "qwen3": "plain"}
WEIGHTS = "adapter_model.safetensors"
SETTINGS = EncoderSettings(
    pooling="mean", normalize=True, append_eos=True, query_prefix="", passage_prefix="", max_tokens=16,
    eval_max_tokens=24,
)  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bases")
    return {kind: small_model(kind, place / kind, style) for kind, style in (CAUSAL | ENCODERS).items()}


def train(base: Path, auto: Any, folder: Path, config: Any = None, **settings: Any) -> Path:
    """An adapter that a program of PEFT alone has trained on a class of the model, and saved."""
    torch.manual_seed(3)
    kind = read_config(base).model_type
    config = config or LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind]} | settings))
    model: Any = get_peft_model(auto.from_pretrained(base), config)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def by_peft(base: Path, auto: Any, adapter: Path | None) -> torch.Tensor:
    """The states before the head."""
    model: Any = auto.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).get_base_model()
    with torch.no_grad():
        return model.eval().base_model(input_ids=IDS).last_hidden_state


def states(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state


def assert_same_vectors(base: Path, auto: Any, adapter: Path) -> None:
    """Ours are those of PEFT on the class that was trained, and not those of the base."""
    found = states(load_adapted(base, adapter, torch.float32, "cpu"))
    torch.testing.assert_close(found, by_peft(base, auto, adapter), rtol=0, atol=1e-6)
    assert float((found - by_peft(base, auto, None)).abs().max()) > 1e-2


def rewrite(folder: Path, change: Any) -> None:
    """`change` takes and gives name -> weight."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def problem(work: Any, starts: Path) -> str:
    with pytest.raises(ValueError) as caught:
        work()
    line = str(caught.value)
    assert line.startswith(f"{starts}") and "\n" not in line
    return line


# --------------------------------------------------------------------------- vectors


@pytest.mark.parametrize("task", ["CAUSAL_LM", None, "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_an_adapter_of_the_language_model_gives_its_vectors(kind: str, task: str | None, bases, tmp_path: Path) -> None:
    adapter = train(bases[kind], AutoModelForCausalLM, tmp_path / "adapter", task_type=task)
    assert any(name.startswith("base_model.model.model.layers.0.") for name in load_file(adapter / WEIGHTS))
    assert_same_vectors(bases[kind], AutoModelForCausalLM, adapter)


@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind != "t5"])  # whose heads are on its decoder
def test_an_adapter_of_an_encoder_with_a_head_gives_its_vectors(kind: str, auto: Any, bases, tmp_path: Path) -> None:
    task = "SEQ_CLS" if auto is AutoModelForSequenceClassification else None
    assert_same_vectors(bases[kind], auto, train(bases[kind], auto, tmp_path / "adapter", task_type=task))


@pytest.mark.parametrize("kind", ["llama", "bert", "modernbert", "nomic_bert", "t5"])
def test_an_adapter_of_the_model_itself_gives_its_vectors(kind: str, bases, tmp_path: Path) -> None:
    auto = T5EncoderModel if kind == "t5" else AutoModel
    assert_same_vectors(bases[kind], auto, train(bases[kind], auto, tmp_path / "adapter"))


def test_an_adapter_of_a_whole_t5_is_refused(bases, tmp_path: Path) -> None:
    """What it does to the decoder would be dropped."""
    adapter = train(bases["t5"], AutoModelForSeq2SeqLM, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"does not fit a T5EncoderModel: \d+ weights \(.*decoder.*\) find no module"):
        load_adapted(bases["t5"], adapter, torch.float32, "cpu")


CONTENTS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"model.layers.1.self_attn.q_proj": 32}},
    "regex": {"target_modules": r"model\.layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.up_proj)"},
    "regex with a start": {"target_modules": r".*layers\.1\..*(q|k)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "whole names": {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "layers of a pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "left out": {"exclude_modules": r"model\.layers\.0\..*"},
    "left out by name": {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole embedding": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [5, 7, 11]},
    "tokens of a module": {"trainable_token_indices": {"model.embed_tokens": [5, 7, 11]}},
    "bias of b": {"lora_bias": True},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("name", CONTENTS)
def test_whatever_an_adapter_holds_gives_its_vectors(name: str, auto: Any, bases, tmp_path: Path) -> None:
    settings = dict(CONTENTS[name])
    if auto is AutoModel and name in ("regex", "one layer", "layers of a pattern", "tokens of a module"):
        return  # name modules that only the class with a head has
    adapter = train(bases["llama"], auto, tmp_path / "adapter", **settings)
    assert_same_vectors(bases["llama"], auto, adapter)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModel])
def test_biases_of_an_adapter_are_read(auto: Any, bias: str, bases, tmp_path: Path) -> None:
    adapter = train(bases["roberta"], auto, tmp_path / "adapter", target_modules=["query", "value"], bias=bias)
    assert_same_vectors(bases["roberta"], auto, adapter)


def test_an_adapter_of_another_kind_gives_its_vectors(bases, tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    adapter = train(bases["llama"], AutoModelForCausalLM, tmp_path / "adapter", config)
    assert_same_vectors(bases["llama"], AutoModelForCausalLM, adapter)


@pytest.mark.parametrize("form", ["default", "no prefix"])
def test_other_forms_of_the_names_are_known(form: str, bases, tmp_path: Path) -> None:
    adapter = train(bases["llama"], AutoModelForCausalLM, tmp_path / "adapter")
    expected = by_peft(bases["llama"], AutoModelForCausalLM, adapter)
    change = {
        "default": lambda name: name.replace(".weight", ".default.weight"),
        "no prefix": lambda name: name.removeprefix("base_model.model."),
    }[form]
    rewrite(adapter, lambda weights: {change(name): weight for name, weight in weights.items()})
    found = states(load_adapted(bases["llama"], adapter, torch.float32, "cpu"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_weights_of_a_head_are_named_and_change_nothing(bases, tmp_path: Path, capfd) -> None:
    targets = ["q_proj", "lm_head"]
    adapter = train(bases["llama"], AutoModelForCausalLM, tmp_path / "adapter", target_modules=targets)
    assert_same_vectors(bases["llama"], AutoModelForCausalLM, adapter)
    names = "base_model.model.lm_head.lora_A.weight, base_model.model.lm_head.lora_B.weight"
    line = f"warning: {adapter}: 2 weights ({names}) of the adapter belong to a head that a retriever does not have; "
    assert capfd.readouterr().err.splitlines() == [line + "they change no vector"]


def test_weights_of_a_pooling_layer_are_named_and_change_nothing(bases, tmp_path: Path, capfd) -> None:
    adapter = train(bases["bert"], AutoModel, tmp_path / "adapter")
    assert_same_vectors(bases["bert"], AutoModel, adapter)
    assert "2 weights (base_model.model.pooler.dense.lora_A.weight, base_model" in capfd.readouterr().err


def test_an_adapter_of_the_model_itself_goes_onto_the_language_model(bases, tmp_path: Path) -> None:
    adapter = train(bases["llama"], AutoModel, tmp_path / "adapter", target_modules=r"layers\.\d\..*(q|v)_proj")
    model: Any = with_adapter(LlamaForCausalLM.from_pretrained(bases["llama"]), adapter)
    found = states(model.get_base_model().model)
    torch.testing.assert_close(found, by_peft(bases["llama"], AutoModel, adapter), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------- what does not fit


def layers(base: Path, folder: Path, count: int) -> Path:
    """A random model like `base` with another number of layers."""
    config = read_config(base)
    config.num_hidden_layers, config.layer_types = count, None
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
def test_an_adapter_of_fewer_or_more_layers_is_refused_with_the_names(auto: Any, bases, tmp_path: Path) -> None:
    three = layers(bases["llama"], tmp_path / "three", 3)
    of_two = train(bases["llama"], auto, tmp_path / "of_two")
    line = problem(lambda: load_adapted(three, of_two, torch.float32, "cpu"), of_two)
    assert (
        "the adapter does not fit a LlamaModel: 2 modules (layers.2.mlp.down_proj, layers.2.self_attn.q_proj) that"
        in (line)
    )
    assert "adapter_config.json names have no weights in adapter_model.safetensors; name the base" in line
    of_three = train(three, auto, tmp_path / "of_three")
    line = problem(lambda: load_adapted(bases["llama"], of_three, torch.float32, "cpu"), of_three)
    prefix = "base_model.model.model." if auto is AutoModelForCausalLM else "base_model.model."
    assert f"4 weights ({prefix}layers.2.mlp.down_proj.lora_A.weight, {prefix}layers.2.mlp.down_proj.lora_B" in line
    assert ", ...) find no module in the model; name the base that it was trained on" in line


def test_an_adapter_in_a_sentence_transformers_folder_is_held_against_its_base_too(bases, tmp_path: Path) -> None:
    three = layers(bases["llama"], tmp_path / "three", 3)
    adapter = train(bases["llama"], AutoModelForCausalLM, tmp_path / "adapter")
    (adapter / "modules.json").write_text("[]")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(three)}))
    with pytest.raises(
        RecipeError, match=r"2 modules \(layers\.2\.mlp\.down_proj, layers\.2\.self_attn\.q_proj\) that "
    ):
        load_any(str(adapter), None, EvalSettings(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {}, ["4 modules (layers.0.mlp.down_proj, layers.0.self_attn.q_proj, layers.1.mlp.down_proj, ...)"]),
        (
            lambda w: {k: v for k, v in w.items() if "q_proj.lora_B" not in k},
            ["2 modules (layers.0.self_attn.q_proj, "],
        ),
        (lambda w: {f"other.{k}": v for k, v in w.items()}, ["8 weights (other.base_model", "4 modules (layers.0.mlp"]),
        (
            lambda w: w | {"base_model.model.model.layers.0.x.lora_A.weight": torch.ones(4, 32)},
            ["1 weight (base_model"],
        ),
        (
            lambda w: {k: v[:2] if "lora_A" in k and "q_proj" in k else v for k, v in w.items()},
            [
                "2 weights (",
                "layers.0.self_attn.q_proj.lora_A.weight [2, 32] in place of [4, 32], ",
                "have another shape",
            ],
        ),
    ],
)
def test_a_file_that_lacks_or_has_others_is_refused_with_the_names(change: Any, words, bases, tmp_path: Path) -> None:
    adapter = train(bases["llama"], AutoModelForCausalLM, tmp_path / "adapter")
    rewrite(adapter, change)
    lora = Lora(rank=4, alpha=8.0, dropout=0.0, targets=TARGETS["llama"])
    for work in (
        lambda: load_adapted(bases["llama"], adapter, torch.float32, "cpu"),
        lambda: adapted(load_encoder_backbone(bases["llama"], torch.float32), lora, adapter, False, 0),
    ):
        line = problem(work, adapter)
        assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"target_modules": ["q_proj", "down_proj", "up_proj"]},
            "2 modules (layers.0.mlp.up_proj, layers.1.mlp.up_proj)",
        ),
        ({"target_modules": ["nothing"]}, "the adapter cannot be put on a LlamaModel ("),
        ({"use_dora": True}, "4 modules (layers.0.mlp.down_proj, "),
        ({"bias": "all", "lora_bias": True}, "4 modules (layers.0.mlp.down_proj, "),
        (
            {"r": 8},
            "8 weights (base_model.model.model.layers.0.mlp.down_proj.lora_A.weight [4, 64] in place of [8, 64]",
        ),
        ({"modules_to_save": ["norm"]}, "5 modules (layers.0.input_layernorm, "),
        (
            {"init_lora_weights": "pissa_niter_16"},
            "init_lora_weights 'pissa_niter_16' changes the base model too; write",
        ),
        ({"use_newer": True}, "use_newer are not known to the installed peft; install a newer one"),
        ({"peft_type": "NEWER"}, "cannot be read (KeyError: 'NEWER'); name the folder of an adapter"),
    ],
)
def test_a_config_that_the_weights_do_not_bear_out_is_refused(settings, words: str, bases, tmp_path: Path) -> None:
    adapter = train(bases["llama"], AutoModelForCausalLM, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert words in problem(lambda: load_adapted(bases["llama"], adapter, torch.float32, "cpu"), adapter)


def test_an_adapter_that_adds_tokens_is_refused(bases, tmp_path: Path) -> None:
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    adapter = train(bases["llama"], AutoModelForCausalLM, tmp_path / "adapter", config)
    line = problem(lambda: load_adapted(bases["llama"], adapter, torch.float32, "cpu"), adapter)
    assert "PROMPT_TUNING, which adds tokens" in line


# --------------------------------------------------------------------------- going on


FOREIGN = {
    "language model": (AutoModelForCausalLM, {"task_type": "CAUSAL_LM"}),
    "regex": (AutoModelForCausalLM, {"target_modules": r"model\.layers\.\d+\.(self_attn\.q|mlp\.down)_proj"}),
    "head": (AutoModelForCausalLM, {"target_modules": ["q_proj", "down_proj", "lm_head"]}),
    "classifier": (AutoModelForSequenceClassification, {"task_type": "SEQ_CLS"}),
    "itself": (AutoModel, {}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_training_goes_on_from_a_foreign_adapter_and_its_export_is_ours(name: str, bases, tmp_path: Path) -> None:
    auto, settings = FOREIGN[name]
    base = bases["llama"]
    adapter = train(base, auto, tmp_path / "adapter", **settings)
    lora = Lora(rank=4, alpha=8.0, dropout=0.0, targets=TARGETS["llama"])
    backbone: Any = adapted(load_encoder_backbone(base, torch.float32), lora, adapter, causal=False, seed=0)
    torch.testing.assert_close(states(backbone), by_peft(base, auto, adapter), rtol=0, atol=1e-6)
    state = {key: 1.5 * weight.detach() for key, weight in backbone.named_parameters() if weight.requires_grad}
    assert len(state) == 8
    backbone.load_state_dict(state, strict=False)
    tokenizer = load_tokenizer(base)
    encoder = Encoder(backbone, SETTINGS.pooling, SETTINGS.normalize).eval()
    live = embed_texts(Retriever(encoder, tokenizer, SETTINGS), TEXTS, "query")
    export = tmp_path / "export"
    write_export(
        export, backbone=backbone, state=state, settings=SETTINGS, tokenizer=tokenizer,
        base=ModelSource(base, str(base), adapter), dtype=torch.float32, merged=True, card=CARD,
    )  # fmt: skip
    written = json.loads((export / "adapter_config.json").read_text())
    assert written["task_type"] == "FEATURE_EXTRACTION" and written["target_modules"] == ["down_proj", "q_proj"]
    assert all(name.startswith("base_model.model.layers.") for name in load_file(export / WEIGHTS))
    np.testing.assert_allclose(embed_texts(load_export(export, "cpu"), TEXTS, "query"), live, rtol=0, atol=1e-6)
    np.testing.assert_allclose(by_sentence_transformers(export), live, rtol=0, atol=1e-6)
    np.testing.assert_allclose(by_sentence_transformers(export / "merged"), live, rtol=0, atol=1e-5)
    again = states(PeftModel.from_pretrained(AutoModel.from_pretrained(base), export))
    torch.testing.assert_close(again, states(backbone), rtol=0, atol=1e-6)


def by_sentence_transformers(folder: Path) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode_query(TEXTS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 2}, "lora has rank 4, alpha 8, targets down_proj, q_proj; add "),
        ({"target_modules": "all-linear"}, "or set lora to rank 4, alpha 8, targets down_proj, gate_proj, k_proj, "),
        ({"target_modules": r".*\.(q|v)_proj"}, "or set lora to rank 4, alpha 8, targets q_proj, v_proj"),
        (
            {"layers_to_transform": [1]},
            "sits on 2 modules (layers.1.mlp.down_proj, layers.1.self_attn.q_proj), not on all that are named down_",
        ),
        (
            {"target_modules": r".*layers\.0\..*q_proj"},
            "sits on 1 module (layers.0.self_attn.q_proj), not on all that are named q_proj, which ",
        ),
        (
            {"use_dora": True},
            "has use_dora True, which a lora section does not say; add adapter to its base by peft's ",
        ),
        ({"use_rslora": True}, "has use_rslora True, which a lora section does not say"),
        ({"rank_pattern": {"q_proj": 2}}, "has rank_pattern {'q_proj': 2}, which a lora section does not say"),
        ({"modules_to_save": ["embed_tokens"]}, "brings 1 weight (base_model.model.model.embed_tokens.weight) of the "),
        ({"lora_bias": True}, "has lora_bias True, which a lora section does not say"),
    ],
)
def test_an_adapter_that_a_lora_section_does_not_say_is_refused(settings, words: str, bases, tmp_path: Path) -> None:
    adapter = train(bases["llama"], AutoModelForCausalLM, tmp_path / "adapter", **settings)
    lora = Lora(rank=4, alpha=8.0, dropout=0.0, targets=TARGETS["llama"])
    backbone = load_encoder_backbone(bases["llama"], torch.float32)
    assert words in problem(lambda: adapted(backbone, lora, adapter, False, 0), adapter)
