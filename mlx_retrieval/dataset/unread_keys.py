"""Tell what a key holds that is not read: a label, a score or negatives of the row's pair, or metadata.

    held_by("is_relevant", 0)              # "label"
    held_by("bm25_score", 12.5)            # "score"
    held_by("wrong_answers", ["Oslo"])     # "negatives"
    held_by("quality_score", 0.9)          # None, metadata

The first three could change what is learnt, so they must not be passed over. Names decide together with values:
`negative_type` and `num_negatives` hold no negatives, and `gold` is a label only as a number. Names are in snake case.
"""

import re
from typing import Any

_PAIR = (
    "(?:pair|bm25|ce|cross|encoder|rerank(?:er)?|retriev(?:al|er)|dense|cos|cosine|sim|match(?:ing)?|teacher|gold|sts"
    "|human|entailment|llm|gpt|judge|pos|neg)"
)
_CONTENT = (
    "(?:passages?|docs?|documents?|texts?|answers?|samples?|examples?|contexts?|ctxs?|candidates?|quer(?:y|ies)"
    "|questions?|paragraphs?|sentences?|responses?|items?|codes?|contents?|list|pool)"
)
_LABEL = re.compile(
    r"(?:.*_)?labels?(?:_?\d+)?|labels?_.*"
    r"|(?:.*_)?(?:ir|non_?)?relevan(?:t|ce|cy)|relevan(?:t|ce|cy)_.*"
    r"|is_(?:an?_)?(?:hard_)?(?:duplicate|positive|negative|correct|incorrect|match|matching|selected|similar"
    r"|paraphrase|answer|gold|related)"
    r"|(?:.*_)?judge?ments?|judge?ments?_.*|gold|gold_.*|targets?|qrels?|rewards?|(?:in)?correct"
    rf"|(?:{_PAIR}_)*grades?"
)
_SCORE = re.compile(rf"(?:{_PAIR}_)*(?:scores?|distances?)(?:_?\d+)?|(?:.*_)?similarit(?:y|ies)|similarity_.*")
_WEIGHT = re.compile(r"(?:(?:sample|example|row|pair|loss|training)_)?weight")
_NEGATIVES = re.compile(
    rf"(?:.*_)?(?:negs?|negatives?|distractors?|rejected|irrelevant)(?:_{_CONTENT}|_{_PAIR})*(?:_?\d+)?"
    rf"|(?:.*_)?(?:wrong|incorrect|bad|false|unrelated|non_?relevant|(?:non_|dis)preferred)(?:_{_CONTENT})+(?:_?\d+)?"
)
_COUNT = re.compile(r"(?:(?:num|n|count|total)_.*)|.*_(?:count|num|total|length|len|version|confidence|year|date|time)")
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?|true|false", re.IGNORECASE)  # as texts, for instance from CSV
_SWAPPED = {  # letters, as in lable
    word[:i] + word[i + 1] + word[i] + word[i + 2 :]: word
    for word in ("label", "labels", "score", "scores", "negative", "negatives", "relevance", "similarity")
    for i in range(len(word) - 1)
    if word[i] != word[i + 1]
}
_MENTION = re.compile(  # of a label, score or negatives; such keys are counted, even if they end like an origin
    r"(?:.*_)?(?:neg|negative|distractor|label|score|similarity|distance|relevance|relevant|irrelevant|grade|rating"
    r"|judge?ment|qrel|reward)s?(?:_?\d+)?(?:_.*)?"
)
_ORIGIN = re.compile(
    r"(?:.*_)?(?:(?:doc|query|passage|[qdp]|gu|uu)?ids?|idx|index|hash|sha\d*|ur[il]|link|path|file|filename|line|row"
    r"|source|origin|corpus|dataset|subset|split|lang|language|license|author|date|time|timestamp|created|updated"
    r"|version|name|tags?|topic|category|domain|type|kind|meta|metadata|comment|notes?)(?:_at|_\d+)?"
)


def is_origin(name: str) -> bool:
    """Return whether a name is one of ids and origins, which are not even counted."""
    return bool(_ORIGIN.fullmatch(name) and not _MENTION.fullmatch(name))


def may_matter(name: str) -> bool:
    """Return whether `held_by` can be other than None for some value."""
    return any(held_by(name, value) for value in (0, "text"))


def held_by(name: str, value: Any) -> str | None:
    """Return "label", "score" or "negatives" if a key's name and value say so; else None."""
    name = _SWAPPED.get(name, name)
    if _are_numbers(value):
        if _COUNT.fullmatch(name):
            return None
        if _LABEL.fullmatch(name) or (_WEIGHT.fullmatch(name) and value != 1):
            return "label"
        return "score" if _SCORE.fullmatch(name) else None
    return "negatives" if _NEGATIVES.fullmatch(name) and _are_texts(value) else None


def _are_numbers(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, (int, float)) for item in value)
    return isinstance(value, (int, float)) or (isinstance(value, str) and bool(_NUMBER.fullmatch(value.strip())))


def _are_texts(value: Any) -> bool:
    """Return whether a value is a text, an object with a text, or a list with one of these."""
    if isinstance(value, list):
        return any(map(_are_texts, value))
    if isinstance(value, dict):
        return any(isinstance(text, str) for text in value.values())
    return isinstance(value, str) and bool(value.strip())
