"""What stands around a text: the tokenizer's own special ids, with or without an end token, whatever it is called."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import wordpiece_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from toolkit.data.tokens import frame, tokenize
from toolkit.export.sentence_layout import retriever_tokenizer
from toolkit.methods.language_model.rows import collate_language_model
from toolkit.models.backbone import load_tokenizer
from toolkit.recipe.models import EncoderSettings

SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>", "<|text|>"]
UNK, BOS, EOS, END, TEXT = range(5)
WORDS = [f"w{i}" for i in range(20)]


def template(single: str) -> Any:
    tokens = [(token, i) for i, token in enumerate(SPECIAL) if token in single.split()]
    pair = single if "$B" in single else single.replace("$A", "$A $B")
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


# style: post-processor, ids before, ids after; the end token is </s>, number 2
STYLES = {
    "nothing": (None, [], []),
    "byte level": (processors.ByteLevel(trim_offsets=False), [], []),
    "llama": (template("<s> $A"), [BOS], []),
    "llama 3": (processors.Sequence([processors.ByteLevel(trim_offsets=False), template("<s> $A")]), [BOS], []),
    "mistral": (template("<s> $A </s>"), [BOS], [EOS]),
    "t5": (template("$A </s>"), [], [EOS]),
    "qwen embedding": (template("$A <|text|>"), [], [TEXT]),
    "qwen in parts": (
        processors.Sequence([processors.ByteLevel(trim_offsets=False), template("$A <|text|>")]),
        [],
        [TEXT],
    ),
    "several": (template("<s> <|text|> $A </s> <|end|>"), [BOS, TEXT], [EOS, END]),
    "bert": (processors.BertProcessing(("<|end|>", END), ("<s>", BOS)), [BOS], [END]),
    "roberta": (processors.RobertaProcessing(("</s>", EOS), ("<s>", BOS)), [BOS], [EOS]),
}


def save(style: str, folder: Path, side: str = "right") -> Path:
    """A folder with a tokenizer of one token a word."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if STYLES[style][0] is not None:
        backend.post_processor = STYLES[style][0]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>", padding_side=side,
        truncation_side=side,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    found = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(found | {"padding_side": side, "truncation_side": side}))
    return folder


def after(style: str, append_eos: bool | None) -> list[int]:
    own = STYLES[style][2]
    return {None: own, True: own or [EOS], False: []}[append_eos]


def encoder(append_eos: bool | None, longest: int) -> EncoderSettings:
    return EncoderSettings(
        pooling="mean", normalize=True, append_eos=append_eos, query_prefix="", passage_prefix="", max_tokens=longest,
        eval_max_tokens=longest,
    )  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("append_eos", [None, True, False])
@pytest.mark.parametrize("style", STYLES)
def test_training_and_export_put_the_same_ids_around_a_text_and_cut_it_on_the_right(style, append_eos, side, tmp_path):
    tokenizer = load_tokenizer(save(style, tmp_path / "base", side))
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "right")
    first, last = STYLES[style][1], after(style, append_eos)
    assert frame(tokenizer, append_eos) == (first, last)
    texts = [" ".join(WORDS[:n]) for n in (1, 5, 6, 20)]
    plain = [[len(SPECIAL) + i for i in range(n)] for n in (1, 5, 6, 20)]
    wanted = [first + ids[: 9 - len(first) - len(last)] + last for ids in plain]
    assert tokenize(tokenizer, texts, "", 9, append_eos) == wanted
    tokenizer.truncation_side = side  # as a tokenizer that came another way
    assert tokenize(tokenizer, texts, "", 9, append_eos) == wanted
    half = [ids[: len(ids) - len(last)] for ids in wanted]
    half = [ids[: len(ids) // 2] + last or [EOS] for ids in half]
    assert tokenize(tokenizer, texts, "", 9, append_eos, half=True) == half
    retriever_tokenizer(tokenizer, encoder(append_eos, 9)).save_pretrained(tmp_path / "export")
    exported = AutoTokenizer.from_pretrained(tmp_path / "export", local_files_only=True)
    assert (exported.padding_side, exported.truncation_side) == ("right", "right")
    assert exported(texts, truncation=True)["input_ids"] == wanted
    for again in (append_eos, None):  # as evaluation loads it, and a stage that starts from it
        assert tokenize(load_tokenizer(tmp_path / "export"), texts, "", 9, again) == wanted


@pytest.mark.parametrize("style", STYLES)
def test_the_language_model_reads_no_end_token(style, tmp_path):
    tokenizer = load_tokenizer(save(style, tmp_path))
    batch = collate_language_model(["w0 w1", "w2"], None, tokenizer, max_tokens=6).text  # pyright: ignore
    first = STYLES[style][1]
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    assert rows == [[*first, 5, 6], [*first, 7]]


def test_a_bert_type_keeps_its_separator_unless_the_user_insists():
    tokenizer = wordpiece_tokenizer()
    tokenizer.eos_token = tokenizer.sep_token
    whole = tokenizer("ab")["input_ids"]
    assert tokenize(tokenizer, ["ab"], "", 9, None) == tokenize(tokenizer, ["ab"], "", 9, True) == [whole]
    assert tokenize(tokenizer, ["ab"], "", 9, False) == [whole[:-1]] and whole[-1] == tokenizer.sep_token_id


def test_no_room_for_a_text_is_an_error(tmp_path):
    tokenizer = load_tokenizer(save("several", tmp_path))
    assert tokenize(tokenizer, ["w0 w1"], "", 5, None) == [[BOS, TEXT, 5, EOS, END]]
    with pytest.raises(ValueError, match="max_tokens 4 leaves no room beside the 4 special ids"):
        tokenize(tokenizer, ["w0 w1"], "", 4, None)


def test_a_vocabulary_that_knows_no_letter_has_a_frame():
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "word": 2}, unk_token="<s>"))
    backend.model = models.WordLevel({"<s>": 0, "</s>": 1, "word": 2}, unk_token="none")
    backend.pre_tokenizer = pre_tokenizers.Split("a", behavior="removed")  # "a" is no token at all
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert frame(tokenizer, None) == ([0], [1])
