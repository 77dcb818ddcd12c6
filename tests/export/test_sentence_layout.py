"""The exported tokenizer gives the ids of training."""

import pytest
from tiny_retriever import ENCODERS, TEXTS, TOKENIZERS, small_tokenizer
from transformers import (
    AutoTokenizer,
)

from toolkit.data.tokens import tokenize
from toolkit.export.sentence_layout import retriever_tokenizer
from toolkit.models.backbone import load_tokenizer
from toolkit.recipe.models import EncoderSettings


@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize("style", TOKENIZERS)
def test_exported_tokenizer_gives_the_ids_of_tokenize(style, append_eos, tmp_path):
    tokenizer = small_tokenizer(style)
    before = tokenizer.backend_tokenizer.to_str()
    settings = EncoderSettings(
        pooling="mean", normalize=True, append_eos=append_eos, query_prefix="find: ", passage_prefix="", max_tokens=8,
        eval_max_tokens=12,
    )  # fmt: skip
    retriever_tokenizer(tokenizer, settings).save_pretrained(tmp_path)
    assert tokenizer.backend_tokenizer.to_str() == before
    exported = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert (exported.padding_side, exported.pad_token, exported.model_max_length) == ("right", "</s>", 12)
    plain = tokenizer(["find: " + text for text in TEXTS], add_special_tokens=False)["input_ids"]
    bos, eos = [0] * style.startswith("bos"), [1] * append_eos
    wanted = [(bos + ids)[: 12 - len(eos)] + eos for ids in plain]
    found = exported(["find: " + text for text in TEXTS], truncation=True)["input_ids"]
    assert found == wanted
    assert exported(["find: " + text for text in TEXTS])["input_ids"] == [bos + ids + eos for ids in plain]
    assert tokenize(tokenizer, TEXTS, "find: ", 999, append_eos) == [bos + ids + eos for ids in plain]
    assert max(map(len, wanted)) == 12
    assert tokenize(exported, TEXTS, "find: ", 12, append_eos) == wanted  # as load_export reads it
    again = retriever_tokenizer(exported, settings)  # a stage that starts from an export
    assert again(TEXTS[0])["input_ids"] == exported(TEXTS[0])["input_ids"]


@pytest.mark.parametrize("style", sorted(set(ENCODERS.values())))
def test_exported_tokenizer_of_an_encoder_gives_the_ids_of_tokenize(style, tmp_path):
    small_tokenizer(style).save_pretrained(tmp_path / "base")
    tokenizer = load_tokenizer(tmp_path / "base")
    settings = EncoderSettings(
        pooling="mean", normalize=True, append_eos=True, query_prefix="find: ", passage_prefix="", max_tokens=8,
        eval_max_tokens=12,
    )  # fmt: skip
    retriever_tokenizer(tokenizer, settings).save_pretrained(tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert (exported.padding_side, exported.pad_token_id) == ("right", tokenizer.pad_token_id)
    # [CLS] text [SEP], or, as T5 does, no first token and an end token
    first, last = ([], tokenizer.eos_token_id) if style == "t5" else ([tokenizer.cls_token_id], tokenizer.sep_token_id)
    assert (exported.eos_token_id, len(exported)) == (last, len(tokenizer))
    plain = tokenizer(["find: " + text for text in TEXTS], add_special_tokens=False)["input_ids"]
    wanted = [[*first, *ids[: 12 - len(first) - 1], last] for ids in plain]
    batch = exported(["find: " + text for text in TEXTS], truncation=True)
    assert batch["input_ids"] == tokenize(tokenizer, TEXTS, "find: ", 12, True) == wanted
    assert "token_type_ids" not in batch  # Encoder passes none either
    assert tokenize(load_tokenizer(tmp_path), TEXTS, "find: ", 12, True) == wanted
    again = retriever_tokenizer(load_tokenizer(tmp_path), settings)  # a stage that starts from an export
    assert again(TEXTS)["input_ids"] == exported(TEXTS)["input_ids"] == tokenize(tokenizer, TEXTS, "", 999, True)


@pytest.mark.parametrize("split", [True, False])
def test_special_tokens_written_in_a_text_stay_what_they_were(split, tmp_path):
    tokenizer = small_tokenizer("bos")
    tokenizer.split_special_tokens = split
    settings = EncoderSettings(
        pooling="mean", normalize=True, append_eos=True, query_prefix="", passage_prefix="", max_tokens=8,
        eval_max_tokens=99,
    )  # fmt: skip
    retriever_tokenizer(tokenizer, settings).save_pretrained(tmp_path)
    ids = load_tokenizer(tmp_path)("a </s> b")["input_ids"]
    assert ids == tokenize(tokenizer, ["a </s> b"], "", 99, True)[0]
    assert ids.count(1) == (1 if split else 2)
