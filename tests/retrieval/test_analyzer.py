"""The analysis of words: identifiers split and kept whole, stems, stop words, languages.

python -m pytest tests/retrieval/test_analyzer.py
"""

import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_retrieval.retrieval.analyzer import LONGEST, QUERY_TERMS, analyzer, is_cut_otherwise, runs
from mlx_retrieval.utils.errors import UserError

PLAIN = analyzer("none")


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("readLine", ["readline", "read", "line"]),
        ("read_line", ["readline", "read", "line"]),
        ("HTTPServer2", ["httpserver2", "http", "server", "2"]),
        ("x86_64 __init__", ["x8664", "x86", "x", "86", "64", "init"]),
        ("loadJSONFile", ["loadjsonfile", "load", "json", "file"]),
        ("read line", ["read", "line"]),
        ("größeÄndern naïve", ["großeandern", "große", "andern", "naive"]),  # not cut at letters beyond ASCII
        ("МояФункция", ["мояфункция", "моя", "функция"]),
        ("搜索引擎", ["搜索引擎", "搜索", "索引", "引擎"]),
        ("readが書くX2", ["readが書くx2", "read", "が書", "書く", "x", "2"]),
        ("हिन्दी की पुस्तकें", ["हिन्दी", "की", "पुस्तकें"]),  # not cut at vowel signs
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("สวัสดี ๒๕", ["สวัสดี", "สวั", "วัส", "สดี", "๒๕"]),  # pairs of characters with their marks
        ("כָּתַב كَتَبَ آية", ["כתב", "كتب", "آية"]),  # points, which most texts leave out
        ("x\u030cY 1\ufe0f\u20e3 \u2764\ufe0fread", ["xy", "x", "y", "1", "read"]),
        ('"a" AND (b OR -c) ^2 title:x* \\', ["a", "and", "b", "or", "c", "2", "title", "x"]),
        (" \t!?", []),
    ],
)
def test_identifiers_are_split_and_kept_whole(text, terms):
    assert PLAIN.terms(text) == terms


def test_texts_without_marks_are_cut_as_before():
    """An index of the first version need be made again only if `is_cut_otherwise` is true of a text in it."""
    texts = (chr(code) * 2 for code in range(0x20000) if not 0xD800 <= code < 0xE000)
    others = [text for text in texts if not is_cut_otherwise(text)]
    assert all(is_cut_otherwise(text) for text in ("कि", "ไท", "x\u030c")) and "é" * 2 in others and "가가" in others
    for text in others:
        expected = re.findall(r"\w+", unicodedata.normalize("NFC", text))
        assert [match[0] for match in runs(unicodedata.normalize("NFC", text))] == expected, text


def test_stems_of_scripts_with_vowel_signs():
    assert analyzer("hindi").terms("पुस्तकें किताबों") == ["पुस्तक", "किताब"]


def test_spellings_of_an_identifier_share_its_parts():
    """Whole identifiers are terms of their own, so the same spelling ranks above its words."""
    for text in ("readLine", "read_line", "ReadLine", "READ_LINE"):
        assert analyzer().terms(text) == analyzer().terms("readLine")
    assert set(analyzer().terms("reading lines")) < set(analyzer().terms("readLine"))


def test_prose_has_stems_and_no_stop_words():
    assert analyzer().terms("Where are the gradients cached?") == ["gradient", "cach"]
    assert analyzer().terms("caching a gradient") == ["cach", "gradient"]
    assert analyzer().terms("is_empty") == ["isempti", "empti"]  # a stop word inside an identifier is part of the whole
    assert analyzer().terms("It doesn't; I don't") == []
    assert analyzer().terms("café CAFE cafe\u0301") == ["cafe"] * 3


def test_other_languages_have_their_own():
    assert analyzer("german").terms("Die Häuser und das Haus") == ["haus", "haus"]
    assert analyzer("french").terms("les méthodes de la méthode") == ["method", "method"]
    assert analyzer("finnish").terms("talossa") == ["talo"]  # stems, and no list of stop words
    assert PLAIN.terms("The methods") == ["the", "methods"]
    with pytest.raises(UserError, match=r"--language englsh: known are none, .*; did you mean english\?"):
        analyzer("englsh")


def test_queries_have_different_terms_and_a_limit():
    assert analyzer().query_terms("read reads reading line") == ["read", "line"]
    assert len(analyzer().query_terms(" ".join(f"w{i}" for i in range(9_999)))) == QUERY_TERMS
    assert analyzer().query_terms("what is this") == []


def test_keys_and_encoded_data_are_no_terms():
    assert PLAIN.terms("a" * LONGEST + " " + "b" * (LONGEST + 1)) == ["a" * LONGEST]


def test_threads_share_an_analyzer():
    """The stemmer keeps the word that it works on."""
    words = [f"w{i}ing running caches" for i in range(500)]
    expected = [analyzer("english").terms(text) for text in words]
    fresh = type(analyzer())("english")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fresh.terms, words)) == expected
