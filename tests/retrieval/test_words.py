# ruff: noqa: RUF001  (letters of other scripts)
"""Words of BM25: how each reading cuts texts, and which language is detected."""

import re
import unicodedata
from typing import get_args

import bm25s
import pytest
import Stemmer
from languages import SENTENCES

from toolkit.recipe.search import Bm25Language
from toolkit.retrieval.words import detected_language, reading_of, words_of


def by_the_library(texts: list[str]) -> list[list[str]]:
    """The words of before: bm25s's, with its English stop words and PyStemmer's English stems."""
    found = bm25s.tokenize(
        texts, stopwords="en", stemmer=Stemmer.Stemmer("english"), return_ids=False, show_progress=False
    )
    assert isinstance(found, list)
    return found


def names_of_before(text: str) -> list[str]:
    case = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
    parts = [part.lower() for name in re.findall(r"[^\W_]+", text) for part in case.split(name)]
    return [part for part in parts if len(part) > 1]


def test_a_recipe_knows_the_languages_of_the_installed_stemmer():
    (listed, _) = get_args(get_args(Bm25Language)[0])
    assert set(get_args(listed)) == {"none", "ngrams", *Stemmer.algorithms()}
    for language in get_args(listed):
        assert words_of(["ein Haus und noch 2 Häuser"], language)[0]
    with pytest.raises(ValueError, match="has no stemmer for klingon, but for arabic, "):
        words_of(["a text"], "klingon")


def test_english_and_names_are_read_as_ever():
    """Also what other readings change: micro signs, ligatures, squares, full-width letters, emoji, soft hyphens."""
    english = [
        "The runners' α-helix of 5 µm² and the ﬁrst ½; naïve café_au_lait, HTTPServer2 x_1 (IL-2Rβ)",
        "ＦＵＬＬ 1️⃣ ❤️ co\u00adop",
        "Ångström Ω K is not the state-of-the-art of GPT-4o, and it's 3.14 ℃",
        "",
    ]
    assert words_of(english, "english") == by_the_library(english)
    names = ["def read_file2(HTTPServer_v2): return naïveÜber_x + 3.14  # ½ ß α", "_a __init__ éCole"]
    assert words_of(names, "code") == [names_of_before(text) for text in names]
    decomposed = unicodedata.normalize("NFD", "Burić naïve")
    assert words_of([decomposed], "english") == by_the_library(["Burić naïve"])  # one spelling for both
    assert by_the_library([decomposed]) != by_the_library(["Burić naïve"])


@pytest.mark.parametrize(
    ("reading", "text", "expected"),
    [
        # Lucene's own example of CJKAnalyzer
        ("ngrams", "我是中国人", ["我是", "是中", "中国", "国人"]),
        ("ngrams", "猫。iPhone手机 Café", ["猫", "iphone", "手机", "café"]),
        ("ngrams", "ＡＢＣ １２ ｶﾞｰﾄﾞ", ["abc", "12", "ガー", "ード"]),
        ("ngrams", "コーヒーと猫", ["コー", "ーヒ", "ヒー", "ーと", "と猫"]),
        ("ngrams", "한국어", ["한국", "국어"]),
        ("ngrams", "ที่นี่", ["ที่นี่"]),  # two letters, each with a vowel sign and a tone mark
        ("ngrams", "ภาษาลาว ພາສາ", ["ภา", "าษ", "ษา", "าล", "ลา", "าว", "ພາ", "າສ", "ສາ"]),
        ("none", "नमस्ते दुनिया, माँ!", ["नमस्ते", "दुनिया", "माँ"]),
        ("none", "தமிழ் বাংলা", ["தமிழ்", "বাংলা"]),
        ("none", "The houses of Das Haus", ["the", "houses", "of", "das", "haus"]),
        ("none", "שָׁלוֹם ק\u200dל", ["שלום", "קל"]),
        ("german", "Die Häuser fu\u0308r das Haus", ["haus", "haus"]),
        ("russian", "и книги о книгах", ["книг", "книг"]),
        ("arabic", "كِتَاب الكتاب كتـاب", ["كتاب", "كتاب", "كتاب"]),
        ("turkish", "İSTANBUL Istanbul ISPARTA'da", ["istanbul", "ıstanbul", "ıspar"]),
        ("greek", "ΟΔΟΣ οδός", ["οδ", "οδ"]),
        ("dutch_porter", "de huizen", ["huiz"]),
        ("porter", "the houses", ["hous"]),
        ("code", "读取File_文件 नमस्ते_x9", ["读取", "file", "文件", "नमस्ते", "x9"]),
    ],
)
def test_each_reading_cuts_as_its_language_is_written(reading: str, text: str, expected: list[str]):
    assert words_of([text, text], reading) == [expected, expected]


@pytest.mark.parametrize("language", sorted(SENTENCES))
def test_the_language_of_a_few_sentences_is_detected(language: str):
    expected, documents = SENTENCES[language]
    assert detected_language(documents, []) == expected
    assert detected_language(documents * 500, []) == expected  # of many texts a part is looked at
    assert detected_language([unicodedata.normalize("NFD", text).upper() for text in documents], []) == expected
    assert reading_of("prose", None, documents, []) == expected
    assert reading_of("prose", "none", documents, []) == "none"
    assert reading_of("code", None, documents, []) == "code"


def test_what_speaks_for_nothing_is_english_or_none():
    for texts in (["w1 w7 w7", "w2"], ["Montreal Berlin Paris", "Roma Berlin"], ["die", "die"]):
        assert detected_language(texts, []) == "english"
    for texts in ([], ["", "!"], ["12 345"], ["שלום עולם"]):
        assert detected_language(texts, []) == "none"


def test_some_chinese_among_other_texts_is_read_in_ngrams():
    english, chinese = SENTENCES["english"][1], SENTENCES["chinese"][1]
    assert detected_language([*english * 3, *chinese], []) == "ngrams"
    assert detected_language(english, chinese) == "ngrams"  # the queries'
    assert detected_language([*english * 20, "The sign said 咖啡."], english) == "english"
