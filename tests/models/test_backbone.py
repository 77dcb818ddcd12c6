"""Loading retrievers: bidirectional encoders beside language models, weights as published, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_model, wordpiece_tokenizer
from tiny_retriever import ENCODERS, TARGETS, small_model, small_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, T5EncoderModel

from toolkit.data.tokens import Tokens, frame, pad, tokenize
from toolkit.methods.shared import recompute_layers
from toolkit.models.backbone import (
    CAUSAL_TYPES,
    ENCODER_TYPES,
    adapted,
    add_lora,
    load_causal_lm,
    load_encoder_backbone,
    load_tokenizer,
    on_meta,
    read_config,
)
from toolkit.models.encoder import Encoder
from toolkit.models.lengths import check_length
from toolkit.recipe.models import Lora

POOLED = ("bert", "roberta", "xlm-roberta")  # published with a layer that no retriever reads
LONGEST = {"bert": 64, "roberta": 62, "xlm-roberta": 62, "distilbert": 64}  # of 64 positions; padding is token 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {kind: small_model(kind, place / kind, tokenizer) for kind, tokenizer in ENCODERS.items()}


def random_rows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(5, 300, (length,), generator=generator).tolist() for length in lengths]


# --------------------------------------------------------------------------- weights as published


@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("names", ["weight/bias", "gamma/beta"])
def test_published_bert_weights_load(prefix: str, pooler: bool, names: str, tmp_path: Path) -> None:
    stock = load_file(save_model(tmp_path, "bert") / "model.safetensors")
    assert {"embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight"} < stock.keys()
    published = {prefix + name: value for name, value in stock.items() if pooler or "pooler" not in name}
    if names == "gamma/beta":
        for name in [name for name in published if "LayerNorm" in name]:
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            published[old] = published.pop(name)
    if prefix:  # a masked language model's head is left out
        published["cls.predictions.bias"] = torch.zeros(96)
    save_file(published, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = dict(load_encoder_backbone(tmp_path, torch.float32).named_parameters())
    assert found.keys() == {name for name in stock if "pooler" not in name}
    assert all(torch.equal(found[name], stock[name]) for name in found)


def test_weights_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path, "bert") / "model.safetensors"
    stock = load_file(path)
    save_file({f"other.{name}": value for name, value in stock.items()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 37 weights of a BertModel \(embeddings\.LayerNorm\.bias, "):
        load_encoder_backbone(tmp_path, torch.float32)
    headless = save_model(tmp_path / "llama", "llama") / "model.safetensors"
    kept = {name: value for name, value in load_file(headless).items() if name != "lm_head.weight"}
    save_file(kept, headless, metadata={"format": "pt"})
    load_encoder_backbone(tmp_path / "llama", torch.float32)  # needs no head
    with pytest.raises(ValueError, match=r"lacks 1 weights of a LlamaForCausalLM \(lm_head\.weight\); name a folder"):
        load_causal_lm(tmp_path / "llama", torch.float32, "sdpa")


def test_a_pickle_beside_or_in_place_of_the_weights_is_never_read(tmp_path: Path) -> None:
    (save_model(tmp_path, "bert") / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    load_encoder_backbone(tmp_path, torch.float32)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"holds its weights as pytorch_model\*\.bin, .* convert it to safetensors where"
    ):
        load_encoder_backbone(tmp_path, torch.float32)


def change_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def refused(folder: Path, *loads: Any) -> list[str]:
    """The one line of each way to load a folder."""
    lines = []
    for load in loads:
        with pytest.raises(ValueError) as caught:
            load(folder)
        lines.append(str(caught.value))
        assert lines[-1].startswith(str(folder)) and "\n" not in lines[-1]
    return lines


def as_retriever(folder: Path) -> Any:
    return load_encoder_backbone(folder, torch.float32)


def as_language_model(folder: Path) -> Any:
    return load_causal_lm(folder, torch.float32, "sdpa")


def test_weights_without_a_place_or_of_another_shape_are_refused_with_the_names(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "llama", "llama")
    for line in refused(change_config(folder, num_hidden_layers=1), as_retriever, as_language_model):
        assert "the weights file holds 9 weights that have no place in a Llama" in line
        assert "(model.layers.1.input_layernorm.weight, " in line and line.endswith("belongs to these weights")
    change_config(folder, num_hidden_layers=2, vocab_size=90)
    (line,) = refused(folder, as_retriever)
    assert "1 weights in other shapes than a LlamaModel of its config.json (" in line
    assert "embed_tokens.weight [96, 32] in place of [90, 32]); " in line
    change_config(folder, vocab_size=96)
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, path, metadata={"format": "pt"})
    assert all("(model.layers.0.self_attn.q_proj.bias)" in x for x in refused(folder, as_retriever, as_language_model))
    encoder = save_model(tmp_path / "bert", "bert")
    (line,) = refused(change_config(encoder, num_hidden_layers=1), as_retriever)
    assert "16 weights that have no place in a BertModel" in line and "(encoder.layer.1.attention.output" in line


@pytest.mark.parametrize("head", ["lm_head.weight", "score.weight", "classifier.bias", "cls.predictions.bias"])
def test_heads_and_old_buffers_may_be_there(head: str, tmp_path: Path) -> None:
    for kind, prefix in (("bert", ""), ("llama", "model.")):
        path = save_model(tmp_path / kind, kind) / "model.safetensors"
        more = (
            {head: torch.ones(3), f"{prefix}embeddings.position_ids": torch.arange(64)[None]} if kind == "bert" else {}
        )
        more |= {f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)} if kind == "llama" else {}
        save_file(load_file(path) | more | {head: torch.ones(3)}, path, metadata={"format": "pt"})
        as_retriever(path.parent)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_causal": False}, "is_causal: false"),
        ({"is_causal": None}, "is_causal: null"),
        ({"is_causal": "false"}, 'is_causal: "false"'),
        ({"text_config": {"is_causal": False}}, "text_config.is_causal: false"),
        ({"a": {"b": {"is_causal": False}}}, "a.b.is_causal: false"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention: true"),
        ({"text_config": {"use_bidirectional_attention": "all"}}, 'text_config.use_bidirectional_attention: "all"'),
    ],
)
@pytest.mark.parametrize("kind", CAUSAL_TYPES)
def test_a_model_that_reads_both_ways_is_no_language_model(kind: str, changes: Any, said: str, tmp_path: Path) -> None:
    folder = change_config(save_model(tmp_path / "m", kind), **changes)
    for line in refused(folder, as_language_model, lambda at: on_meta(read_config(at), causal=True)):
        assert line.startswith(f"{folder}: config.json says {said}, so the model reads both ways and predicts no next ")
        assert line.endswith("can be the retriever only; as the language model name one without that")


@pytest.mark.parametrize("changes", [{}, {"is_causal": True}, {"use_bidirectional_attention": False}])
def test_a_model_that_reads_one_way_is_a_language_model(changes: Any, tmp_path: Path) -> None:
    folder = change_config(save_model(tmp_path / "m", "qwen3"), **changes)
    (row,) = random_rows(9)
    ids = torch.tensor([row]) % 96
    other = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 96], 1)
    with torch.no_grad():
        for model in (as_language_model(folder).model, as_retriever(folder)):
            same = [model(input_ids=x).last_hidden_state[0, :-1] for x in (ids, other)]
            assert torch.equal(*same)  # no token sees a later one


@pytest.mark.parametrize("kind", CAUSAL_TYPES)
def test_a_retriever_that_reads_both_ways_does_so_with_and_without_padding(kind: str, tmp_path: Path) -> None:
    folder = change_config(save_model(tmp_path / "m", kind), is_causal=False)
    model, (row,) = as_retriever(folder), random_rows(9)
    row = [token % 96 for token in row]
    alone, padded = pad([row], 0), pad([row, row + row], 0)
    other = pad([[*row[:-1], (row[-1] + 1) % 96]], 0)
    with torch.no_grad():
        found, in_batch, changed = (model(**x._asdict()).last_hidden_state[0] for x in (alone, padded, other))
        torch.testing.assert_close(in_batch[: len(row)], found, rtol=0, atol=1e-5)
        assert float((changed[0] - found[0]).abs().max()) > 1e-3
        theirs = AutoModel.from_pretrained(folder)(**padded._asdict()).last_hidden_state[0]
        torch.testing.assert_close(theirs, in_batch, rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [{"text_config": {"is_causal": False}}, {"use_bidirectional_attention": True}])
def test_a_retriever_whose_config_asks_in_vain_to_read_both_ways_is_refused(changes: Any, tmp_path: Path) -> None:
    folder = change_config(save_model(tmp_path / "m", "llama"), **changes)
    for line in refused(folder, as_retriever, lambda at: on_meta(read_config(at), causal=False)):
        assert "which has no effect on type llama; set is_causal to false at its top" in line


@pytest.mark.parametrize("model_type", ["unknown", "llama"])
def test_code_in_a_folder_is_never_run(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where someone answers yes to the question that transformers asks; control: where it asks, it runs."""
    folder, ran = save_model(tmp_path / "model", "llama"), tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig\nclass Theirs(LlamaConfig): pass\n"
    (folder / "code.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "code.Theirs", "AutoModel": "code.Theirs", "AutoModelForCausalLM": "code.Theirs"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": own}))
    own = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["code.Theirs", "code.Theirs"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (load_encoder_backbone, lambda *at: load_causal_lm(*at, "sdpa")):
        if model_type == "llama":  # as the library knows it
            load(folder, torch.float32)
        else:
            with pytest.raises(ValueError, match="model type 'unknown' is not supported; use one of llama"):
                load(folder, torch.float32)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_tokenizer(folder)
    assert not ran.exists()
    if model_type == "unknown":
        AutoConfig.from_pretrained(folder)  # asks, and is answered
        assert ran.exists()


def test_of_a_t5_the_encoder_alone_is_read_and_the_rest_is_said(folders: dict[str, Path], tmp_path: Path, capsys):
    folder = small_model("t5", tmp_path / "t5", "t5")
    names = load_file(folder / "model.safetensors").keys()
    decoder = sum(name.startswith("decoder.") for name in names)
    backbone = load_encoder_backbone(folder, torch.float32)
    line = f"note: {folder}: {decoder} weights of a decoder are left out; the encoder alone is read\n"
    assert 0 < decoder < len(names) and capsys.readouterr().err == line
    assert all(not name.startswith("decoder.") for name, _ in backbone.named_parameters())
    save_file(
        {name: weight for name, weight in load_file(folder / "model.safetensors").items() if "decoder." not in name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert load_encoder_backbone(folder, torch.float32) is not None and capsys.readouterr().err == ""
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of a T5EncoderModel \(encoder\.block\.0"):
        load_encoder_backbone(folder, torch.float32)


NOMIC = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "layer_norm_epsilon": 1e-12, "rotary_emb_base": 1000}
NOMIC |= {"prenorm": False, "qkv_proj_bias": False, "activation_function": "swiglu", "rotary_emb_fraction": 1.0}
NOMIC |= {"n_positions": 8192, "auto_map": {"AutoModel": "nomic-ai/nomic-bert-2048--modeling.NomicBertModel"}}


def test_nomic_bert_loads_under_the_names_of_its_own_code(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = small_model("nomic_bert", tmp_path / "nomic", "wordpiece")
    backbone = load_encoder_backbone(folder, torch.float32)
    state = dict(backbone.state_dict())
    old = {
        "embeddings.LayerNorm": "emb_ln", "self_attn.o_proj": "attn.out_proj", "up_proj": "fc11", "gate_proj": "fc12",
        "down_proj": "fc2", "post_attention_layernorm": "norm1", "post_mlp_layernorm": "norm2",
    }  # fmt: skip
    published = {}
    for name, weight in state.items():
        for ours, theirs in old.items():
            name = name.replace(ours, theirs)
        published[f"encoder.{name}" if name.startswith("layers") else name] = weight
    for layer in ("encoder.layers.0", "encoder.layers.1"):
        parts = [published.pop(f"{layer}.self_attn.{part}_proj.weight") for part in "qkv"]
        published[f"{layer}.attn.Wqkv.weight"] = torch.cat(parts)
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text()) | NOMIC
    path.write_text(json.dumps(config))
    loaded = load_encoder_backbone(folder, torch.float32)
    assert all(torch.equal(weight, state[name]) for name, weight in loaded.state_dict().items())
    wrong = [
        ("n_head", 2, "write it as num_attention_heads too"),
        ("rotary_emb_base", 10000, "rope_parameters.rope_theta"),
    ]
    for name, value, fix in [*wrong, ("prenorm", True, "name a model without that")]:
        path.write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=f"config.json: {name} is {value}, .*{fix}") as caught:
            load_encoder_backbone(folder, torch.float32)
        assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------- what trains


def test_every_supported_encoder_is_tried() -> None:
    assert ENCODERS.keys() == set(ENCODER_TYPES)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("kind", ENCODER_TYPES)
def test_every_parameter_gets_a_gradient(folders: dict[str, Path], kind: str, recompute: bool) -> None:
    tokens = pad(random_rows(9, 5), 1)

    def without_gradient(backbone: Any) -> list[str]:
        Encoder(backbone, "mean", True)(tokens).square().mul(torch.arange(32)).sum().backward()
        return [name for name, weight in backbone.named_parameters() if weight.grad is None]

    backbone = load_encoder_backbone(folders[kind], torch.float32).train()
    if recompute:
        recompute_layers(backbone)
    assert without_gradient(backbone) == []
    stock = without_gradient((T5EncoderModel if kind == "t5" else AutoModel).from_pretrained(folders[kind]))
    assert stock == (["pooler.dense.weight", "pooler.dense.bias"] if kind in POOLED else [])


@pytest.mark.parametrize("kind", ENCODER_TYPES)
def test_adapters_are_a_function_of_the_seed_and_all_of_them_train(folders: dict[str, Path], kind: str) -> None:
    tokens = pad(random_rows(9, 5), 1)
    lora = Lora(rank=2, alpha=4.0, dropout=0.0, targets=TARGETS[kind])

    def made(seed: int) -> Any:
        return adapted(load_encoder_backbone(folders[kind], torch.float32), lora, None, causal=False, seed=seed)

    model = made(1)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    layers = 2 * sum({"dense": 3, "Wo": 2}.get(target, 1) for target in lora.targets)  # of each type, per layer
    assert len(trained) == 2 * layers and all("lora_" in name for name in trained)
    again, other = (dict(made(seed).named_parameters()) for seed in (1, 2))
    assert all(torch.equal(weight, again[name]) for name, weight in trained.items())
    assert not all(torch.equal(weight, other[name]) for name, weight in trained.items())
    Encoder(model, "eos", True)(tokens).square().mul(torch.arange(32)).sum().backward()
    assert all(weight.grad is not None for weight in trained.values())
    with pytest.raises(ValueError, match="LoRA targets no_proj match no module; the model has "):
        add_lora(load_encoder_backbone(folders[kind], torch.float32), 2, 4.0, 0.0, ["no_proj"], False, 0)


@pytest.mark.parametrize("pooling", ["mean", "eos"])
@pytest.mark.parametrize("kind", ENCODER_TYPES)
def test_padding_changes_nothing(folders: dict[str, Path], kind: str, pooling: str) -> None:
    encoder = Encoder(load_encoder_backbone(folders[kind], torch.float64), pooling, False)
    rows = random_rows(60, 3, 31)  # ModernBERT's layers see 4 tokens to each side, so some padding sees padding alone
    with torch.no_grad():
        padded = encoder(pad(rows, 1))
        alone = torch.cat([encoder(pad([row], 1)) for row in rows])
        assert float((padded - alone).abs().max()) < 1e-12
        ids = pad(rows, 7).input_ids
        assert float((encoder(Tokens(ids, torch.ones_like(ids))) - alone).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ENCODER_TYPES)
def test_encoders_read_both_ways_and_predict_nothing(folders: dict[str, Path], kind: str) -> None:
    backbone = load_encoder_backbone(folders[kind], torch.float64)
    (row,) = random_rows(9)
    with torch.no_grad():
        a, b = (backbone(**pad([ids], 1)._asdict()).last_hidden_state[0, 0] for ids in (row, [*row[:-1], row[-1] + 1]))
    assert float((a - b).abs().max()) > 1e-3
    fix = rf"{kind}' reads both ways .* can be the retriever only; as the language model name one of type llama, "
    with pytest.raises(ValueError, match=fix) as caught:
        load_causal_lm(folders[kind], torch.float32, "sdpa")
    assert str(caught.value).startswith(f"{folders[kind]}: ") and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=fix):
        on_meta(read_config(folders[kind]), causal=True)
    sizes = [weight.numel() for weight in on_meta(read_config(folders[kind]), causal=False).parameters()]
    assert sizes == [weight.numel() for weight in backbone.parameters()]


# --------------------------------------------------------------------------- length


@pytest.mark.parametrize(("kind", "longest"), LONGEST.items())
def test_the_longest_input_is_the_longest_that_runs(folders: dict[str, Path], kind: str, longest: int) -> None:
    backbone, config = load_encoder_backbone(folders[kind], torch.float32), read_config(folders[kind])
    check_length(config, longest)
    assert backbone(**pad(random_rows(longest), 1)._asdict()).last_hidden_state.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        backbone(**pad(random_rows(longest + 1), 1)._asdict())
    with pytest.raises(ValueError, match=rf"for {longest} tokens; .* at most {longest} \(found {longest + 1}\)$"):
        check_length(config, longest + 1)


@pytest.mark.parametrize("kind", ["modernbert", "nomic_bert", "t5", "llama"])
def test_rotary_and_relative_positions_have_no_longest_input(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    folder = folders[kind] if kind in folders else save_model(tmp_path, kind)
    check_length(read_config(folder), 65)
    assert load_encoder_backbone(folder, torch.float32)(input_ids=torch.full((1, 65), 7)) is not None


# --------------------------------------------------------------------------- tokenizers


def test_the_separator_ends_a_text_where_no_end_token_is_named(tmp_path: Path) -> None:
    wordpiece_tokenizer().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()).get("eos_token") is None
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token == "[SEP]" and len(tokenizer) == 96
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert frame(tokenizer, append_eos=True) == ([first], [last])
    a, b, d = tokenizer.convert_tokens_to_ids(["a", "##b", "##d"])
    assert tokenize(tokenizer, ["AB d", "abbbbb"], "", 5, True)[1] == [first, a, b, b, last]
    assert tokenize(tokenizer, ["abd"], "", 9, True) == [[first, a, b, d, last]]
    assert tokenize(tokenizer, ["abd"], "", 9, True, half=True) == [[first, a, last]]
    assert tokenize(tokenizer, ["abd"], "", 9, False) == [[first, a, b, d]]


@pytest.mark.parametrize("lacking", ["tokenizer.json", None])
def test_a_vocabulary_alone_makes_the_tokenizer(lacking: str | None, tmp_path: Path) -> None:
    tokenizer = wordpiece_tokenizer()
    save_model(tmp_path, "bert")
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "vocab.txt").write_text("\n".join(piece for piece, _ in pieces) + "\n", encoding="utf-8")
    if lacking:
        (tmp_path / lacking).unlink()
    texts = ["Open(path) reads a FILE", "é 9"]
    assert load_tokenizer(tmp_path)(texts)["input_ids"] == tokenizer(texts)["input_ids"]


def test_a_named_end_token_stays(tmp_path: Path) -> None:
    tokenizer = small_tokenizer("bos")
    tokenizer.sep_token = "<s>"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).eos_token == "</s>"
    tokenizer.sep_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"names no end token \(eos_token\)"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("pad_id", "kept"), [(-1, None), (0, 0), (None, None)])
def test_a_negative_padding_id_of_a_config_is_taken_as_none(pad_id: Any, kept: Any, tmp_path: Path, capfd) -> None:
    folder = change_config(save_model(tmp_path / "m", "llama"), pad_token_id=pad_id)
    for load in (as_retriever, as_language_model):
        model = load(folder)
        assert model.config.pad_token_id == kept and model.get_input_embeddings().padding_idx == kept
    said = capfd.readouterr().err
    line = f"warning: {folder}/config.json: pad_token_id -1 is no token; it is taken as null\n"
    assert said == (line if pad_id == -1 else "")


@pytest.mark.parametrize(("kind", "pad_id"), [("llama", 96), ("llama", 5_000), ("bert", 96), ("roberta", -1)])
def test_a_padding_id_of_a_config_outside_the_vocabulary_is_one_line(kind: str, pad_id: int, tmp_path: Path) -> None:
    folder = (
        small_model(kind, tmp_path / "m", ENCODERS[kind]) if kind == "roberta" else save_model(tmp_path / "m", kind)
    )
    change_config(folder, pad_token_id=pad_id)
    for line in refused(folder, as_retriever, read_config):
        assert f"config.json: pad_token_id {pad_id} is outside the vocabulary of " in line and "; write " in line


# --------------------------------------------------------------------------- the head


def of_head(causal_lm: Any, ids: torch.Tensor) -> bool:
    """Whether the logits are what the head makes of the last states: the next-token loss takes them so."""
    with torch.no_grad():
        logits, states = causal_lm(input_ids=ids).logits, causal_lm.model(input_ids=ids).last_hidden_state
        return torch.equal(logits, causal_lm.get_output_embeddings()(states))


def test_the_head_alone_makes_the_logits_of_every_type_that_is_read(tmp_path: Path) -> None:
    """Types that scale or cap their logits after the head are not read."""
    ids = torch.tensor(random_rows(9)) % 96
    for kind in CAUSAL_TYPES:
        assert of_head(load_causal_lm(save_model(tmp_path / kind, kind), torch.float32, "sdpa"), ids)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    for kind in ("gemma2", "cohere", "granite"):
        config = AutoConfig.for_model(kind, **sizes, **({"logits_scaling": 8.0} if kind == "granite" else {}))
        assert not of_head(AutoModelForCausalLM.from_config(config).eval(), ids)
        config.save_pretrained(tmp_path / kind)
        with pytest.raises(ValueError, match=f"model type '{kind}' is not supported; use one of llama, mistral"):
            read_config(tmp_path / kind)


OWN = {"AutoModel": "modeling_own.OwnModel", "AutoModelForCausalLM": "modeling_own.OwnLM"}


def test_a_class_of_its_own_is_said_once_and_not_run(tmp_path: Path, capfd) -> None:
    folder = change_config(save_model(tmp_path / "m", "llama"), auto_map=OWN)
    (folder / "modeling_own.py").write_text("raise SystemExit('foreign code ran')")
    said = f"warning: {folder}: config.json names a class of its own (modeling_own.{{}}), whose code is not run; the "
    said += "standard {} is used, so check that its {} are those published\n"
    for _ in range(2):
        load_encoder_backbone(folder, torch.float32)
        on_meta(read_config(folder), causal=False)
    assert capfd.readouterr().err == said.format("OwnModel", "LlamaModel", "vectors")
    load_causal_lm(folder, torch.float32, "sdpa")
    on_meta(read_config(folder), causal=True)
    assert capfd.readouterr().err == said.format("OwnLM", "LlamaForCausalLM", "predictions")
    other = change_config(save_model(tmp_path / "other", "bert"), auto_map={"AutoConfig": "own.Config"})
    load_encoder_backbone(other, torch.float32)
    assert capfd.readouterr().err == ""
