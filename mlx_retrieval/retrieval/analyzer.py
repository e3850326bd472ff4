"""Turn texts into the terms that a search by words compares: one analysis for indices, queries, evaluation and mining.

analyzer("english").terms("The readLine methods")     # ["readlin", "read", "line", "method"]
analyzer("none").terms("The readLine methods")        # ["the", "readline", "read", "line", "methods"]

A word is cut where its case or its digits change, and at underscores: readLine, read_line and HTTPServer2 give their
parts, and the whole as well. Stop words are left out, and each term becomes its stem (Snowball). With the language
"none" both stay. Vowel signs and other marks are part of their word. Scripts without spaces give overlapping pairs of
characters, each with its marks. A term holds only letters, digits and marks, so a search engine needs to split at white
space alone, and can take none of them for an operator.
"""

import functools
import re
import threading
import unicodedata
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

from mlx_retrieval.utils.errors import UserError, near_miss

ENGLISH, NONE = "english", "none"
ANALYSIS = 2  # version; 1 cut words at their marks, and no Thai, Lao, Burmese or Khmer
LONGEST = 64  # characters of a term; longer ones are keys or encoded data, and nobody's query
QUERY_TERMS = 256  # different terms of a query that count, the first ones
REMEMBERED = 1 << 16  # words whose terms are kept in memory
REMEMBERED_QUERIES = 8  # the same, of queries: each hit of a request asks for its query's terms again

_RUN = re.compile(r"\w+")  # of ASCII
_PART = re.compile(r"U+(?!l)|U?l+|d+")  # of a word's shape: U = capital, l = other letter, d = digit
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# Thai, Lao, Burmese and Khmer, without their digits.
_SOUTH_EAST = "\u0e01-\u0e4e\u0e81-\u0ecd\u0edc-\u0edf\u1000-\u103f\u1050-\u108f\u109a-\u109f\u1780-\u17d3"
_UNSPACED = re.compile(f"[{_IDEOGRAPHS}{_SOUTH_EAST}]+")
# Marks that most texts leave out: accents, and the vowel points of Hebrew and Arabic.
_ACCENTS = re.compile(
    "[\u0300-\u036f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u064b-\u0652\u0656-\u065f\u0670"
    "\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed]"
)
# Marks of symbols and pictures, as of a key with a number: no part of words.
_OF_SYMBOLS = re.compile("[\u20d0-\u20ff\ufe00-\ufe0f]")
# Of questions as people ask them. Words that name things in source code (all, more, other, same) are terms.
_ENGLISH = (
    "a about am an and any are aren as at be because been being but by can could couldn d did didn do does doesn "
    "doing don for from had has hasn have having he her here hers him his how i if in into is isn it its itself "
    "just ll m me my of on or our ours s she should shouldn so some such t than that the their theirs them then "
    "there these they this those through to too up us ve very was wasn we were weren what when where which while "
    "who whom why will with won would wouldn you your yours "
)
_STOP_WORDS_OF = {  # language -> name of the list in bm25s
    "danish": "DANISH", "dutch": "DUTCH", "french": "FRENCH", "german": "GERMAN", "italian": "ITALIAN",
    "norwegian": "NORWEGIAN", "portuguese": "PORTUGUESE", "russian": "RUSSIAN", "spanish": "SPANISH",
    "swedish": "SWEDISH", "turkish": "TURKISH",
}  # fmt: skip


class Analyzer:
    """The analysis of texts in one language. Make one by `analyzer`, which keeps them."""

    def __init__(self, language: str):
        self.language = language
        self._stop_words = _stop_words(language)
        self._stem = _stemmer(language)
        self._terms_of = functools.lru_cache(REMEMBERED)(self._analyze)
        self._query_terms_of = functools.lru_cache(REMEMBERED_QUERIES)(self._analyze_query)

    def terms(self, text: str) -> list[str]:
        """Return the terms of a text, in their order."""
        return list(self._iterate(text))

    def query_terms(self, text: str) -> list[str]:
        """Return the different terms of a query, at most QUERY_TERMS; [] if it has only stop words, or no word."""
        return list(self._query_terms_of(text))

    def stream(self, text: str) -> str:
        """Return the terms of a text, separated by spaces."""
        return " ".join(self.terms(text))

    def _analyze_query(self, text: str) -> tuple[str, ...]:
        terms: dict[str, None] = {}
        for term in self._iterate(text):
            terms[term] = None
            if len(terms) == QUERY_TERMS:
                break
        return tuple(terms)

    def _iterate(self, text: str) -> Iterator[str]:
        for match in runs(unicodedata.normalize("NFC", text)):
            yield from self._terms_of(match[0])

    def _analyze(self, run: str) -> tuple[str, ...]:
        """Return the terms of a run of letters, digits, marks and underscores."""
        words = [word for word in run.split("_") if word]
        terms = [self._term("".join(words))] if len(words) > 1 else []
        for word in words:
            parts = _parts(word)
            terms += [self._term(part) for part in parts]
            if len(parts) > 1:
                terms.insert(len(terms) - len(parts), self._term(word))
        return tuple(term for term in terms if term)

    def _term(self, word: str) -> str:
        """Return the term of a word or of a part of one; "" if it is a stop word or too long."""
        word = word.lower()
        if word in self._stop_words or len(word) > LONGEST:
            return ""
        if self.language == ENGLISH:  # its accents are optional: café, naïve
            return self._stem(_without_accents(word))
        return _without_accents(self._stem(word))  # other stemmers need them


def analyzer(language: str = ENGLISH) -> Analyzer:
    """Return the analyzer of a language, or of "none". Raises UserError for an unknown one."""
    return _analyzer(language)


@functools.cache
def _analyzer(language: str) -> Analyzer:
    return Analyzer(check_language(language))


def check_language(language: str) -> str:
    """Return the name of a language that has stems, or "none". Raises UserError for an unknown one."""
    if language in (ENGLISH, NONE):
        return language
    import snowballstemmer

    known = [NONE, *sorted(snowballstemmer.algorithms())]
    if language not in known:
        raise UserError(f"--language {language}: known are {', '.join(known)}{near_miss(language, known)}")
    return language


def runs(text: str) -> Iterator[re.Match]:
    """Yield the runs of letters, digits, marks and underscores in a text: words and identifiers."""
    return (_RUN if text.isascii() else _patterns().run).finditer(text)


def is_cut_otherwise(text: str) -> bool:
    """Return whether version 1 of the analysis gave other words for a text."""
    return not text.isascii() and _patterns().newer.search(unicodedata.normalize("NFC", text)) is not None


class Patterns(NamedTuple):
    """What words beyond ASCII are made of; Python's \\w has no marks."""

    run: re.Pattern
    unit: re.Pattern  # a character with its marks
    newer: re.Pattern  # a character that version 1 of the analysis took otherwise


@functools.cache
def _patterns() -> Patterns:
    marks = (mark for mark in map(chr, range(0x300, 0x20000)) if unicodedata.category(mark) in ("Mn", "Mc"))
    within = _OF_SYMBOLS.sub("", "".join(marks))
    return Patterns(*map(re.compile, (rf"\w[\w{within}]*", f".[{within}]*", f"[{within}{_SOUTH_EAST}]")))


def _parts(word: str) -> list[str]:
    """Return the parts of a word: read and Line of readLine, x and 86 of x86; overlapping pairs of ideographs."""
    if word.isascii() and word.isalpha() and (word.islower() or word[1:].islower()):
        return [word]
    parts, at = [], 0
    for match in _UNSPACED.finditer(word):
        parts += _by_case(word[at : match.start()])
        units, at = _patterns().unit.findall(match[0]), match.end()
        parts += [first + second for first, second in pairwise(units)] or units
    return [*parts, *_by_case(word[at:])]


def _by_case(word: str) -> Iterator[str]:
    shape = ""
    for c in word:
        is_mark = not c.isascii() and unicodedata.category(c)[0] == "M"  # of the character before it
        shape += (shape[-1:] or "l") if is_mark else "d" if c.isdigit() else "U" if c.isupper() else "l"
    return (word[match.start() : match.end()] for match in _PART.finditer(shape))


def _without_accents(word: str) -> str:
    if word.isascii():
        return word
    return unicodedata.normalize("NFC", _ACCENTS.sub("", unicodedata.normalize("NFD", word)))


def _stop_words(language: str) -> frozenset[str]:
    """Return the stop words of a language; none of a language without a list."""
    if language == ENGLISH:
        return frozenset(_ENGLISH.split())
    if language not in _STOP_WORDS_OF:
        return frozenset()
    from bm25s import stopwords

    return frozenset(getattr(stopwords, f"STOPWORDS_{_STOP_WORDS_OF[language]}"))


def _stemmer(language: str) -> Callable[[str], str]:
    """Return the function that stems a word in lower case."""
    if language == NONE:
        return str
    import snowballstemmer

    stemmer, lock = snowballstemmer.stemmer(language), threading.Lock()  # it keeps the word that it works on

    def stem(word: str) -> str:
        with lock:
            return stemmer.stemWord(word)

    return stem
