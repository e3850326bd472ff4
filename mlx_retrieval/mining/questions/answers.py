"""Read the questions in a language model's answer, and tell which of them cannot be used.

    parse("1. What is a kidney stone?\\n2. How is it treated?")     # ["What is a kidney stone?", "How is it treated?"]
    flaw("What does the passage say?", "A kidney stone is ...")     # "mentions the text"

Small models answer in many shapes: lists with numbers, dashes or quotes, JSON, with a line before and remarks behind.
All of these are read. Whatever is not a question is dropped, and counted by its reason.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_retrieval.mining.questions.base import WORD

EMPTY, REFUSAL, NONSENSE, LANGUAGE = "no question in the answer", "refusal", "not a question", "another script"
MENTION, CUT, EXTRA = "mentions the text", "cut off", "more than asked for"
LONGEST = 60  # words of a question
SHARE = 0.2  # of a chunk's letters: the script of a question has at least as many
KEYS = ("question", "query", "text", "claim", "keywords", "search", "content")
LISTS = ("questions", "queries", "claims", "searches", "results", "items", "output")

_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"^\s*```\w*\s*$", re.MULTILINE)
_ITEM = re.compile(r"(?:(?<=[?.!。？！\"”])|(?<=^))\s*(?=\(?\d{1,2}[.)]\s)")  # "1. What ...? 2. How ...?" in one line
_NUMBER = re.compile(r"^[\s>]*(?:[-*•–—·]+|\(?\d{1,2}\s*[.):\]])\s+")
_OPENING = re.compile(r"^[\[{]\s*(?=[\"'])")  # of JSON that was cut off
_LABEL = re.compile(
    r"^(?:the\s+)?(?:q|(?:search\s+)?(?:question|query|queries|keywords?|claim|search|everyday)s?)\s*"
    r"(?:(?:no\.?|number|#)?\s*\d{1,2})?\s*[:.)\-–]\s+",
    re.IGNORECASE,
)
_ANSWER = re.compile(r"^(?:a|answer|explanation|note|reason|context|passage)\s*\d*\s*:", re.IGNORECASE)
_INTRODUCTION = re.compile(r"[:：]$|^(?:sure|certainly|of course|here (?:is|are)|here's)\b.{0,80}$", re.IGNORECASE)
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "„": "“", "「": "」", "`": "`"}
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able)|sorry,|i (?:can(?:no|')t|cannot|could not|couldn't|do not|don't) "
    r"(?:\w+ )?(?:answer|help|assist|provide|create|write|generate|have|see|find|fulfil)|as an ai|as a language model"
    r"|i(?:'m| am) ready to|how (?:can|may) i (?:help|assist)|what(?:'s| is) your question"
    r"|no (?:questions?|queries|claims?) (?:can|could) be|unable to (?:answer|generate|provide|create))",
    re.IGNORECASE,
)
_MENTION = re.compile(
    r"\b(?:(?:the|this|that|these|given|above|following|provided) (?:\w+ )?"
    r"(?:passage|paragraph|excerpt|snippet|extract)s?\b"
    r"|(?:given|provided|following|above) text\b|the (?:above|author|writer)\b(?! (?:of|the))"
    r"|(?:according to|based on|in|from|by|does|did) (?:the|this) (?:text|document|article|section|context)\b"
    r"|(?:mentioned|described|stated|discussed|given|listed) (?:above|here|below))"
    r"|^th(?:e|is) (?:text|document)\b|\bthe (?:text|document)[?.!]?$"
    r"|\bthe (?:text|document) (?:is|says|mentions|states|describes|proves|concludes|answers)\b",
    re.IGNORECASE,
)
# Scripts that one language mixes count as one.
_SCRIPTS = dict.fromkeys(("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HALFWIDTH", "BOPOMOFO"), "CJK")
_SCRIPTS["FULLWIDTH"] = "LATIN"


# --- reading ----------------------------------------------------------------------------------------------------------


def parse(answer: str) -> list[str]:
    """Return the questions in an answer, each on one line, in their order; [] if there are none."""
    text = _FENCE.sub("", _THOUGHT.sub("", answer)).strip()
    values = _json_texts(text)
    lines = values if values is not None else [item for line in text.splitlines() for item in _ITEM.split(line)]
    questions = [_stripped(line) for line in lines]
    return [question for question in questions if question and not _is_frame(question)]


def _json_texts(text: str) -> list[str] | None:
    """Return the texts of a JSON list or object, perhaps with words around it; None if there is none."""
    for opening, closing in ("[]", "{}"):
        start, end = text.find(opening), text.rfind(closing)
        if 0 <= start < end:
            try:
                if texts := [*_texts_of(json.loads(text[start : end + 1]))]:
                    return texts
            except (ValueError, RecursionError):
                continue
    return None


def _texts_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts_of(item)
    elif isinstance(value, dict):
        names = [name for name in value if str(name).lower() in (*LISTS, *KEYS)]
        for name in names[:1]:
            yield from _texts_of(value[name])


def _stripped(line: str) -> str:
    """Return a line without its number, label, emphasis and quotes."""
    line, before = " ".join(line.split()), None
    while line != before:
        before = line
        line = _LABEL.sub("", _NUMBER.sub("", _OPENING.sub("", line))).strip().strip("*_").strip()
        line = line.removesuffix(",").removesuffix("\\n").strip() if line[:1] in _QUOTES else line
        if len(line) > 1 and _QUOTES.get(line[0]) == line[-1]:
            line = line[1:-1].strip()
    return line


def _is_frame(line: str) -> bool:
    """Return whether a line is around the questions, and none of them."""
    if line.endswith(("?", "？")):
        return False
    return bool(_INTRODUCTION.search(line) or _ANSWER.match(line)) or not any(map(str.isalpha, line))


# --- judging ----------------------------------------------------------------------------------------------------------


def is_refusal(text: str) -> bool:
    """Return whether a model says that it will not answer."""
    return bool(_REFUSAL.search(text.replace("’", "'")))


def flaw(question: str, chunk: str) -> str:
    """Return why a question cannot be used for a chunk of this text; "" if it can."""
    if is_refusal(question):
        return REFUSAL
    words = WORD.findall(question.casefold())
    if not 2 <= len(words) <= LONGEST or "\ufffd" in question or _babbles(words):
        return NONSENSE
    if _MENTION.search(question):
        return MENTION
    of_chunk, of_question = scripts(chunk), scripts(question)
    if not of_question:
        return NONSENSE
    script, _ = of_question.most_common(1)[0]
    return LANGUAGE if of_chunk and of_chunk[script] < SHARE * of_chunk.total() else ""


def _babbles(words: Sequence[str]) -> bool:
    """Return whether the words are the same few again and again."""
    return len(words) >= 6 and len(set(words)) < 0.4 * len(words)


def scripts(text: str) -> Counter[str]:
    """Return the number of letters of each script: `LATIN`, `CYRILLIC`, `CJK`, which is Japanese too, and so on."""
    found: Counter[str] = Counter()
    for letter, count in Counter(text).items():
        if letter.isalpha():
            script = unicodedata.name(letter, "UNKNOWN").partition(" ")[0]
            found[_SCRIPTS.get(script, script)] += count
    return found
