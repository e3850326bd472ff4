"""The names that the keys and columns of rows may have, and what each of them is in a row.

role_of("hardNegatives")                # "negatives"
role_of("url")                          # None
"""

import functools
import re

# Role -> names of keys. Upper and lower case, "-", " " and "_" do not count.
ROLES = {
    "query": ("query", "anchor", "question"),
    "document": (
        "document", "positive", "positives", "pos", "passage", "answer", "positive_passages", "positive_messages",
    ),
    "documents": ("documents",),
    "negatives": (
        "negative", "negatives", "neg", "hard_negative", "hard_negatives", "negative_passages", "negative_messages",
        "rejected_response",
    ),
    "label": ("label", "score", "similarity"),
    "scores": ("scores",),
    "positive scores": ("pos_scores",),
    "negative scores": ("neg_scores",),
    "rank": ("rank",),
    "prompt": ("prompt",),
}  # fmt: skip
# Names that often hold something else: they count where no other key has the role.
WEAK_ROLES = {
    "query": ("sentence1", "input"),
    "document": ("response", "context", "text", "sentence2"),
}
NUMBERED_NEGATIVE = re.compile(r"(?:hard_)?neg(?:ative)?_?\d+")
# In rows of ms-swift the query is the messages, beside positive_messages.
MESSAGES, POSITIVE_MESSAGES = "messages", "positive_messages"

_STRONG = {name: role for role, names in ROLES.items() for name in names}
_WEAK = {name: role for role, names in WEAK_ROLES.items() for name in names}


def snake_case(key: str) -> str:
    """Return a key as ROLES spells it: `hardNegatives` and `hard-negatives` as `hard_negatives`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key.strip()).lower().replace("-", "_").replace(" ", "_")


@functools.lru_cache(maxsize=1024)
def role_of(key: str, weak: bool = True) -> str | None:
    """Return the role that a key has by its name; None if it has none. `weak`: names of WEAK_ROLES count."""
    name = snake_case(key)
    if NUMBERED_NEGATIVE.fullmatch(name):
        return "negatives"
    return _STRONG.get(name) or (_WEAK.get(name) if weak else None)
