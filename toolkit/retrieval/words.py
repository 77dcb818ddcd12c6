"""Texts -> words for BM25: how a language's words are cut and stemmed, and which language a collection is in.

A *reading* is "code", or a language as `Bm25Language` names it. Called by bm25 and by everything that uses it.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from unicodedata import normalize

import bm25s
import regex
import Stemmer
from bm25s import stopwords

CODE = "code"
NGRAMS = "ngrams"
_ENGLISH = ("english", "porter")

# Written without spaces: the scripts of Lucene's CJKAnalyzer (Han, Hiragana, Katakana, Hangul) and their kin, with the
# marks that both kana share; and South East Asia's (UAX #14, line breaking class SA: Thai, Lao, Khmer, Burmese ...),
# whose vowel signs belong to the letter before (grapheme clusters).
_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Bopomofo}\p{Yi}\u3031-\u3035\u303C\u3099\u309A\u30FC"
_SA = r"\p{LB=SA}"
_UNSPACED = regex.compile(rf"[{_CJK}{_SA}]")
_RUN = regex.compile(rf"(?P<cjk>[{_CJK}]+)|(?P<sa>[{_SA}]+)|[^{_CJK}{_SA}]+")
_CLUSTER = regex.compile(r"\X")
# A word goes on over its vowel signs and accents: Python's \w ends at them.
_WORD = regex.compile(r"[\p{L}\p{N}_][\p{L}\p{N}_\p{Mn}\p{Mc}]*")
_NAME = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{Mn}\p{Mc}]*")
_CASE = regex.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
# Not seen, or left out as often as written: soft hyphens, joiners and variation selectors, the vowel points of Hebrew
# and Arabic, tatweel (as Lucene's ArabicNormalizationFilter).
_UNSEEN = regex.compile(
    r"[\u00AD\u200D\uFE00-\uFE0F\u0640\u0591-\u05BD\u05BF\u05C1\u05C2\u05C4\u05C5\u05C7\u064B-\u0652\u0670]"
)
_TURKISH = str.maketrans("I\u0130", "\u0131i")  # as Lucene's TurkishLowerCaseFilter

_STOP_WORDS: dict[str, tuple[str, ...]] = {
    "danish": stopwords.STOPWORDS_DANISH,
    "dutch": stopwords.STOPWORDS_DUTCH,
    "dutch_porter": stopwords.STOPWORDS_DUTCH,
    "french": stopwords.STOPWORDS_FRENCH,
    "german": stopwords.STOPWORDS_GERMAN,
    "italian": stopwords.STOPWORDS_ITALIAN,
    "norwegian": stopwords.STOPWORDS_NORWEGIAN,
    "portuguese": stopwords.STOPWORDS_PORTUGUESE,
    "russian": stopwords.STOPWORDS_RUSSIAN,
    "spanish": stopwords.STOPWORDS_SPANISH,
    "swedish": stopwords.STOPWORDS_SWEDISH,
    "turkish": stopwords.STOPWORDS_TURKISH,
}


def words_of(texts: list[str], reading: str) -> list[list[str]]:
    """The words of each text, in lower case, as a reading finds them.

    code: parts of two letters or more of names, split at underscores and case (HTTPServer_v2 -> http, server, v2);
    pieces of scripts without spaces as in ngrams.
    ngrams: pairs of neighbouring characters of scripts without spaces, a lone character by itself, and whole words of
    other scripts, as Lucene's CJKAnalyzer (我是中国人 -> 我是, 是中, 中国, 国人).
    none: words of two characters or more. Another language: these without its stop words (bm25s has lists of
    twelve languages), stemmed (Snowball).

    Raises:
        ValueError: for a language that PyStemmer does not know.
    """
    if reading == CODE:
        return [list(_parts_of_names(text)) for text in texts]
    if reading == NGRAMS:
        return [list(_pieces(_plain(text))) for text in texts]
    if reading in _ENGLISH:  # the words behind published numbers: composed, else left as they are
        composed = [normalize("NFC", text) for text in texts]
        return bm25s.tokenize(  # pyright: ignore[reportReturnType]
            composed,
            stopwords="en",
            stemmer=_stemmer(reading),  # pyright: ignore[reportArgumentType]
            return_ids=False,
            show_progress=False,
        )
    if reading == "turkish":
        texts = [text.translate(_TURKISH) for text in texts]
    left_out = frozenset(_STOP_WORDS.get(reading, ()))
    found = [[sys.intern(word) for word in _long_words(_plain(text)) if word not in left_out] for text in texts]
    if reading == "none":
        return found
    unique = list({word for row in found for word in row})
    stems = dict(zip(unique, _stemmer(reading).stemWords(unique), strict=True))
    return [[stems[word] for word in row] for row in found]


def _stemmer(language: str) -> Stemmer.Stemmer:
    try:
        return Stemmer.Stemmer(language)
    except KeyError:
        known = ", ".join(Stemmer.algorithms())
        raise ValueError(f"the installed PyStemmer has no stemmer for {language}, but for {known}") from None


def _plain(text: str) -> str:
    """Full-width and compatibility forms as the usual ones, composed, in lower case, without what is not seen."""
    return _UNSEEN.sub("", normalize("NFKC", text).lower())


def _long_words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text) if len(word) > 1]


def _pieces(text: str) -> Iterator[str]:
    for word in _WORD.findall(text):
        for part in _parts(word):
            yield sys.intern(part)


def _parts_of_names(text: str) -> Iterator[str]:
    for name in _NAME.findall(text if text.isascii() else _UNSEEN.sub("", normalize("NFC", text))):
        for word in _CASE.split(name):
            for part in _parts(word.lower()):
                yield sys.intern(part)


def _parts(word: str) -> Iterator[str]:
    """A word of two characters or more; where it has scripts without spaces, their pairs of neighbours."""
    if word.isascii():
        if len(word) > 1:
            yield word
        return
    for run in _RUN.finditer(word):
        if run.lastgroup is None:
            if len(run[0]) > 1:
                yield run[0]
            continue
        characters = _CLUSTER.findall(run[0]) if run.lastgroup == "sa" else run[0]
        if len(characters) == 1:
            yield run[0]
        for first, second in pairwise(characters):
            yield first + second


# --------------------------------------------------------------------------- which language it is

_SAMPLE, _CHARACTERS = 300, 1000  # texts that are looked at, evenly spaced, and of each its beginning
_SHARE_UNSPACED = 0.1  # of all letters, from which on texts are read in n-grams
_SCRIPTS = ("Latin", "Cyrillic", "Greek", "Arabic", "Armenian", "Devanagari", "Tamil")
_IN_SCRIPT = {script: regex.compile(rf"\p{{Script={script}}}") for script in _SCRIPTS}
_LETTER = regex.compile(r"\p{L}")
_ONE_LANGUAGE = {"Greek": "greek", "Armenian": "armenian", "Tamil": "tamil"}  # of those with a stemmer, for certain
_RUSSIAN, _ONLY_RUSSIAN = regex.compile(r"[\u0430-\u044F\u0451]"), regex.compile(r"[ыэё]")  # the latter Bulgarian lacks
_NOT_ARABIC = regex.compile(r"[پچژگکیہےٹڑ]")  # Persian, Urdu and others
_HINDI = frozenset(["है", "हैं", "के", "का", "की", "में", "से", "और", "को", "ने", "पर"])
_VOTERS = {language: frozenset(listed) for language, listed in _STOP_WORDS.items()}
_VOTERS = {language: listed for language, listed in _VOTERS.items() if language not in ("dutch_porter", "russian")}
_VOTERS["english"] = frozenset(stopwords.STOPWORDS_EN) | frozenset(stopwords.STOPWORDS_EN_PLUS)
_NEAR = {"danish", "norwegian"}  # share most function words


def reading_of(text: str, language: str | None, documents: list[str], queries: list[str]) -> str:
    """The reading for `text` ("prose" or "code") and a language, which is detected if it is None."""
    return CODE if text == CODE else language or detected_language(documents, queries)


def detected_language(documents: list[str], queries: list[str]) -> str:
    """The language to read a collection in: n-grams for scripts without spaces, else by its documents' main script.

    Latin: the language whose function words (bm25s's lists) are 12 % of all words or more, and 1.7 times as many as any
    other's; else english. Measured: right for one text of 3,000 to 5,000 words in each of the eleven languages with a
    list, english for Catalan, Czech, Polish and Vietnamese, and for all but one of 15,000 pieces of English (claims,
    questions, docstrings). Cyrillic, Arabic and Devanagari: russian, arabic and hindi, unless their letters or words
    speak against it; then, and for other scripts, none.
    """
    sample = _sample(documents)
    if max(_share_unspaced(sample), _share_unspaced(_sample(queries))) >= _SHARE_UNSPACED:
        return NGRAMS
    counts = {script: len(pattern.findall(sample)) for script, pattern in _IN_SCRIPT.items()}
    script = max(counts, key=counts.__getitem__)
    if 2 * counts[script] <= len(_LETTER.findall(sample)):
        return "none"
    if script == "Latin":
        return _by_function_words(_long_words(sample))
    if script == "Cyrillic":
        known, own = (len(pattern.findall(sample)) / counts[script] for pattern in (_RUSSIAN, _ONLY_RUSSIAN))
        return "russian" if known > 0.99 and (own > 0.002 or counts[script] < 1000) else "none"
    if script == "Arabic":
        return "arabic" if len(_NOT_ARABIC.findall(sample)) < 0.01 * counts[script] else "none"
    if script == "Devanagari":
        found = _long_words(sample)
        return "hindi" if sum(word in _HINDI for word in found) > 0.05 * len(found) else "none"
    return _ONE_LANGUAGE[script]


def _sample(texts: list[str]) -> str:
    spaced = islice(texts, 0, None, max(1, len(texts) // _SAMPLE))
    return "\n".join(_plain(text[:_CHARACTERS]) for text in spaced)


def _share_unspaced(text: str) -> float:
    return len(_UNSPACED.findall(text)) / max(1, len(_LETTER.findall(text)))


def _by_function_words(found: list[str]) -> str:
    counts = Counter(found)
    votes = {language: sum(counts[word] for word in listed) for language, listed in _VOTERS.items()}
    best = max(votes, key=votes.__getitem__)
    rivals = [votes[other] for other in votes if other != best and not {best, other} <= _NEAR]
    several = sum(word in counts for word in _VOTERS[best]) > 2
    return best if several and votes[best] >= max(0.12 * len(found), 1.7 * max(rivals)) else "english"
