"""Suggest the `--columns` for a row whose keys have no names that are known, by names, lengths and question marks.

suggestion({"nr": "7", "frage": "Warum tropft der Boiler?", "antwort": "Das Ventil ..."})
# "--columns query=frage,document=antwort"
"""

import re
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from mlx_retrieval.dataset.roles import role_of, snake_case
from mlx_retrieval.dataset.unread_keys import is_origin
from mlx_retrieval.utils.text import shell

QUERY_WORDS = (
    "q", "query", "queries", "question", "anchor", "prompt", "instruction", "title", "subject", "search", "keyword",
    "headline", "utterance", "user", "input", "source", "problem", "frage", "anfrage", "titel", "betreff", "pregunta",
    "consulta", "titre", "requête", "requete", "domanda", "pergunta", "vraag", "fråga", "вопрос", "问题", "質問",
    "질문",
)  # fmt: skip
DOCUMENT_WORDS = (
    "a", "d", "answer", "document", "doc", "passage", "text", "body", "content", "description", "solution", "response",
    "reply", "output", "completion", "target", "abstract", "article", "code", "positive", "snippet", "antwort",
    "inhalt", "beschreibung", "lösung", "loesung", "respuesta", "contenido", "réponse", "reponse", "contenu",
    "risposta", "resposta", "antwoord", "svar", "ответ", "答案", "回答", "답변",
)  # fmt: skip
UNWRITABLE = re.compile(r"[,+=]")  # in --columns these signs separate
LAST = re.compile(r"(?:(?<![^\W\d_])[a-z]|\d+)$")  # of the names of a series
NUMBER = re.compile(r"[+-]?[\d.,]+")
MOST = 30  # columns that are looked at


def suggestion(row: Mapping[str, Any], by_name: bool = True) -> str:
    """Return the `--columns ...` that would most likely make a row of a query and a document; "" = no idea.

    `by_name`: whether keys with the names of roles are read without it.
    """
    own = {role: key for key in row if (role := role_of(key)) in ("query", "document") and row[key] is not None}
    own = own if by_name else {}
    texts = {key: row[key] for key in row if not (by_name and role_of(key)) and _may_be_text(key, row[key])}
    if len(plain := {key: text for key, text in texts.items() if not is_origin(snake_case(key))}) + len(own) >= 2:
        texts = plain
    texts = dict(list(texts.items())[:MOST])
    if "query" in own:
        pairs = [(own["query"], key) for key in texts]
    elif "document" in own:
        pairs = [(key, own["document"]) for key in texts]
    else:
        pairs = list(permutations(texts, 2))
    if not pairs:
        unwritable = [key for key in row if UNWRITABLE.search(key) and isinstance(row[key], str)]
        rename = f"rename {unwritable[0]!r}, or call columns by number" if unwritable else ""
        return f"--columns query=1,document=2 in a table: {rename}" if unwritable else ""
    query, document = max(pairs, key=lambda pair: _score(*pair, row))
    chosen = {"query": query, "document": document}
    if not own and [query, document] == list(texts)[:2] and len(texts) == 3 and is_series(list(texts)):
        chosen["negatives"] = list(texts)[2]
    return shell("--columns", ",".join(f"{role}={key}" for role, key in chosen.items() if role not in own))


def is_series(keys: Sequence[str]) -> bool:
    """Return whether names count: they differ in their last letter or number alone, each followed by the next one."""
    places = [LAST.search(snake_case(key)) for key in keys]
    if not all(places) or len({place.string[: place.start()] for place in places}) > 1:
        return False
    values = [int(place[0]) if place[0].isdigit() else ord(place[0]) for place in places]
    return values == list(range(values[0], values[0] + len(values)))


def _may_be_text(key: str, value: Any) -> bool:
    is_text = isinstance(value, str) and bool(value.strip()) and not NUMBER.fullmatch(value.strip())
    return is_text and not UNWRITABLE.search(key)


def _score(query: str, document: str, row: Mapping[str, Any]) -> float:
    """Return how likely these keys hold a query and its document."""
    first, second = str(row[query]).strip(), str(row[document]).strip()
    score = 6.0 * (role_of(query) == "query") + 6.0 * (role_of(document) == "document")
    score += 3.0 * has_word(query, QUERY_WORDS) + 3.0 * has_word(document, DOCUMENT_WORDS)
    score += 2.0 * first.endswith(("?", "？")) - 2.0 * second.endswith(("?", "？"))
    return score + (len(first) <= len(second)) + 0.5 * len(second) / (len(first) + len(second))


def has_word(key: str, words: tuple[str, ...]) -> bool:
    """Return whether a name, or a part of it, is one of the words, in the singular or plural."""
    parts = snake_case(key).split("_")
    return any(part == word or (len(word) > 3 and word in part) for part in parts for word in words)
