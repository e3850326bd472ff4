"""Parse one row of training data into examples, by the names of its keys.

A row is a pair of a query and its document, with negatives or without; a pair with a label; or documents that a teacher
has scored. `roles.ROLES` lists the names that a key may have, and columns.py maps others to them. A key without a value
(null) is absent. Keys of other names are ignored, and counted unless they look like ids or origins; a row in which one
holds a label, a score or negatives of the pair is refused (unread_keys.py).
"""

import functools
import re
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from mlx_retrieval.dataset.beir import document_text
from mlx_retrieval.dataset.column_hints import is_series, suggestion
from mlx_retrieval.dataset.columns import NEEDED, Columns, listing, mapped, missing, names
from mlx_retrieval.dataset.json_lines import RowError, parse_object, reason_of
from mlx_retrieval.dataset.roles import (
    MESSAGES,
    NUMBERED_NEGATIVE,
    POSITIVE_MESSAGES,
    ROLES,
    WEAK_ROLES,
    role_of,
    snake_case,
)
from mlx_retrieval.dataset.unread_keys import held_by, is_origin, may_matter
from mlx_retrieval.utils.text import listed, quantity

OWN_KEYS = {"query", "anchor", "document", "positive", "documents", "negative", "negatives", "scores", "rank"}
KINDS = {"pair": "query/document", "documents": "query/documents/scores", "label": "query/document/label"}
MAX_RANK = 2**31 - 1


class Example(NamedTuple):
    """A query, a positive of it, its own hard negatives, and the rank of the positive (1 = best)."""

    query: str
    positive: str
    negatives: tuple[str, ...]
    rank: int
    scores: tuple[float, ...] = ()  # a teacher's, of the positive and the negatives; () = not scored
    other_positives: tuple[str, ...] = ()  # of the same row; each is the positive of another example


def common_parts(common: dict[str, str] | None, example: Example, kind: str) -> dict[str, str]:
    """Return which of query, positive and label an example shares with those before it; `common` is None for the first.

    A label is shown as a number; only rows of the kind "label" have one.
    """
    label = {"label": f"{example.scores[0]:g}"} if kind == "label" else {}
    parts = {"query": example.query, "positive": example.positive} | label
    return parts if common is None else dict(common.items() & parts.items())


class Reading(NamedTuple):
    """The keys of a row by their roles; None or () = not there."""

    kind: str  # one of KINDS
    query: str
    document: str  # or "documents", if a teacher has scored them
    negatives: tuple[str, ...] = ()
    label: str | None = None
    scores: str | None = None
    positive_scores: str | None = None
    negative_scores: str | None = None
    rank: str | None = None
    prompt: str | None = None
    unread: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()  # keys that are not read, and whose names are not those of ids or origins
    suspects: tuple[str, ...] = ()  # keys that are not read, and whose values may be labels, scores or negatives

    @property
    def used(self) -> set[str]:
        """All keys that are read."""
        return {key for field in self[1:-3] if field for key in ([field] if isinstance(field, str) else field)}


class NoFormatError(RowError):
    """The keys of a row have no query, or no document. `needed` says what they should have."""

    def __init__(self, reason: str, needed: str = ""):
        super().__init__(f"{reason}{needed}")
        self.reason = reason


class KindError(RowError):
    """A row is of another kind than the rows before."""


class ColumnsError(RowError):
    """`--columns` would help. `hint` is the flag as it would most likely work."""

    def __init__(self, reason: str, hint: str):
        super().__init__(f"{reason}; try {hint}")
        self.reason, self.hint = reason, hint


@functools.lru_cache(maxsize=256)
def reading_of(keys: tuple[str, ...]) -> Reading:
    """Return the roles of the keys of a row. RowError if they make no row, or could be read in more than one way."""
    snake = {key: snake_case(key) for key in keys}

    def find(role: str) -> str | None:
        for words in (ROLES[role], WEAK_ROLES.get(role, ())):
            if len(found := [key for key in keys if snake[key] in words]) > 1:
                raise RowError(
                    f"{' and '.join(found)} could each be the {role}: choose one (--columns {role}={found[0]})"
                )
            if found:
                return found[0]
        return None

    query, document, documents = find("query"), find("document"), find("documents")
    if query is None and document is not None and snake[document] == POSITIVE_MESSAGES:
        query = next((key for key in keys if snake[key] == MESSAGES), None)
    if query is None and document is None and documents is None and find("label") is not None:
        query, document = _pair_in_series(keys) or (None, None)
    if query is None:
        raise NoFormatError(
            f"keys {listing(keys)} fit no format",
            " (query and document, with negatives or without; query, document and label; query, documents and scores)",
        )
    if document is None and documents is None:
        reason = "no positive: a row with a query needs a document or a positive"
        raise NoFormatError(f"{reason}; there are {listing(keys)}")
    # Of sentence pairs and the like, a `prompt` may be one that a model was given to write them.
    prompt = find("prompt") if snake[query] in ROLES["query"] else None
    if documents is not None:
        if document is not None and snake[document] not in WEAK_ROLES["document"]:
            raise RowError(
                f"{document} and {documents} could each be the document: keep one of the keys (--ignore-keys)"
            )
        reading = Reading("documents", query, documents, scores=find("scores"), prompt=prompt)
        return _with_unread(reading, snake)
    negatives = [key for key in keys if snake[key] in ROLES["negatives"]]
    numbered = [key for key in keys if NUMBERED_NEGATIVE.fullmatch(snake[key])]
    numbered.sort(key=lambda key: int(re.search(r"\d+$", snake[key])[0]))
    label, scores = find("label"), find("scores")
    if label is not None and not (negatives or numbered):
        return _with_unread(Reading("label", query, document, label=label, prompt=prompt), snake)
    if label is not None and scores is None and snake[label] == "score":  # a list of them, as `scores`
        scores = label
    elif label is not None:
        raise RowError(
            f"{label} cannot be used beside {', '.join(negatives + numbered)}: rename a teacher's scores, of the "
            f"positive and then of each negative, to `scores`, or leave the key unread (--ignore-keys {label})"
        )
    by_side = (None, None) if scores else (find("positive scores"), find("negative scores"))
    if by_side[0] is None and by_side[1] is not None:
        raise RowError(f"{by_side[1]} without pos_scores (--ignore-keys {by_side[1]} leaves it unread)")
    rest = (scores, *by_side, find("rank"), prompt)
    return _with_unread(Reading("pair", query, document, tuple(negatives + numbered), None, *rest), snake)


def _pair_in_series(keys: Sequence[str]) -> tuple[str, str] | None:
    """Return the keys of two texts whose names only count, such as text1 and text2; None = there are none."""
    others = [key for key in keys if role_of(key) is None and not is_origin(snake_case(key))]
    return (others[0], others[1]) if len(others) == 2 and is_series(others) else None


def _with_unread(reading: Reading, names: dict[str, str]) -> Reading:
    """Return a reading with the keys that it leaves unread. `names`: all keys, and their names in snake case."""
    unread = {key: name for key, name in names.items() if key not in reading.used}
    return reading._replace(
        unread=tuple(unread),
        ignored=tuple(key for key, name in unread.items() if not is_origin(name)),
        suspects=tuple(key for key, name in unread.items() if may_matter(name)),
    )


def _check_unread(row: dict, reading: Reading) -> None:
    """RowError if a key that is not read holds what could change what is learnt."""
    for key in reading.suspects:
        if held := held_by(snake_case(key), row[key]):
            read = ", ".join(other for other in row if other in reading.used)
            rename = (
                "rename negatives to `negatives`"
                if held == "negatives"
                else "rename a label to `label` or a teacher's scores to `scores`"
            )
            raise RowError(
                f"{key} cannot be used beside {read}: {rename}, or leave the key unread (--ignore-keys {key})"
            )


def parse(
    line: bytes, expected: str | None = None, ignore_keys: Collection[str] = (), columns: Columns | None = None
) -> tuple[list[Example], Reading]:
    """Return the examples of one line, and how it was read. RowError gives the reason if the line is not a row."""
    row = without(parse_object(line), ignore_keys)
    return examples_of(mapped_row(row, columns) if columns else row, expected)


def mapped_row(row: dict, columns: Columns) -> dict:
    """Return a row with its columns under the keys that `--columns` gives them. RowError if that makes no row."""
    changed = mapped(row, columns)
    if changed is row:
        try:
            reading_of(present(row))
        except NoFormatError as error:
            raise RowError(missing(names(columns), tuple(row))) from error
    return changed


def reading_for(row: dict, expected: str | None = None) -> Reading:
    """Return the roles of a row's keys that have a value. RowError as `reading_of`.

    If no row before could be read (`expected` is None), the error suggests `--columns`.
    """
    try:
        return reading_of(present(row))
    except NoFormatError as error:
        if empty := [key for key in row if row[key] is None and role_of(key) in NEEDED]:
            raise RowError(f"{' and '.join(empty)} {'has' if len(empty) == 1 else 'have'} no value") from error
        if expected is None and (hint := suggestion(row)):
            raise ColumnsError(error.reason, hint) from error
        raise


def present(row: dict) -> tuple[str, ...]:
    """Return the keys of a row that have a value."""
    return tuple([key for key, value in row.items() if value is not None])


def without(row: dict, keys: Collection[str]) -> dict:
    """Return a row without some of its keys, if it has them."""
    return {key: value for key, value in row.items() if key not in keys} if keys else row


def examples_of(row: dict, expected: str | None = None) -> tuple[list[Example], Reading]:
    """Return the examples of a row, one for each positive, and how it was read.

    Args:
        expected: the kind of the rows before, which this one must have as well.

    Raises RowError if the row is not of that kind, or a value is not what its key needs.
    """
    reading = reading_for(row, expected)
    if expected is not None and reading.kind != expected:
        here, before = KINDS[reading.kind], KINDS[expected]
        raise KindError(f"has the format {here}, but the rows before have {before}")
    if reading.suspects:
        _check_unread(row, reading)
    query = _text(row[reading.query], reading.query)
    if reading.prompt:
        query = _prompt(row[reading.prompt], reading.prompt) + query
    if reading.kind == "documents":
        return [_scored_documents(query, row, reading)], reading
    positives = _positives(row, reading.document)
    distinct = list(dict.fromkeys(positives)) if len(positives) > 1 else positives
    if reading.kind == "label":
        label = row[reading.label]
        if not isinstance(label, (int, float)) or not 0 <= label <= 1:
            raise RowError(
                f"{reading.label} {repr(label)[:20]} is not a number from 0 to 1; divide by the top of the scale, or "
                f"leave it unread: --ignore-keys {reading.label}"
            )
        return [Example(query, text, (), 1, (float(label),)) for text in distinct], reading
    negatives = tuple([text for key in reading.negatives for text in _texts(row, key)])
    rank = _rank(row[reading.rank]) if reading.rank else 1
    of_positives, of_negatives = _teacher_scores(row, reading, len(positives), len(negatives))
    examples = []
    for i, text in enumerate(distinct):
        scores = (of_positives[positives.index(text)], *of_negatives) if of_positives else ()
        others = (*distinct[:i], *distinct[i + 1 :])
        examples.append(Example(query, text, negatives, rank, scores, others))
    return examples, reading


def own_row(row: dict, reading: Reading, example: Example) -> dict:
    """Return the row of one example: as it is if it has the toolkit's own keys and one positive, else with these."""
    if reading.used <= OWN_KEYS and not example.other_positives:
        return row
    others = {key: value for key, value in row.items() if key not in reading.used and value is not None}
    others |= {"rank": example.rank} if reading.rank else {}
    return {"query": example.query, "positive": example.positive, **others, "negatives": list(example.negatives)}


def ignored_keys(counts: Counter[str]) -> str:
    """Return one line about keys that were not read, and in how many rows."""
    keys = (f"{key} ({quantity(count, 'row')})" for key, count in counts.most_common())
    return f"keys that are not read: {listed(keys, 8)}"


# --- values -----------------------------------------------------------------------------------------------------------


def _text(value: Any, key: str) -> str:
    """Return a text, the title and text of an object that has them, or the texts of messages, joined by line breaks."""
    original = value
    if isinstance(value, list) and value and all(isinstance(item, dict) and "content" in item for item in value):
        contents = [_content(message["content"], key) for message in value]
        value = "\n".join(text for text in contents if text.strip())
    elif isinstance(value, dict) and "content" in value and "text" not in value:
        value = _content(value["content"], key)
    elif isinstance(value, dict) and isinstance(value.get("text"), str):
        title = value.get("title")
        value = document_text(title, value["text"]) if title is None or isinstance(title, str) else None
    if not isinstance(value, str):
        raise RowError(f"{key} is not a text{reason_of(original)}")
    if not value.strip():
        raise RowError(f"{key} is empty")
    return value


def _prompt(value: Any, key: str) -> str:
    return "" if value == "" else _text(value, key)


def _content(content: Any, key: str) -> str:
    """Return the content of a message: a text, or a list of parts that are."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RowError(f"{key}: the content of a message is not a text")
    return content


def _positives(row: dict, key: str) -> list[str]:
    values = row[key] if isinstance(row[key], list) else [row[key]]
    if not (texts := [_text(value, key) for value in values if value is not None]):
        raise RowError(f"{key} is empty")
    return texts


def _texts(row: dict, key: str) -> list[str]:
    values = row[key] if isinstance(row[key], list) else [row[key]]
    try:
        return [_text(value, key) for value in values if value is not None]
    except RowError as error:
        raise RowError(f"{key} must be a text or a list of texts, none of them empty") from error


def _rank(rank: Any) -> int:
    if isinstance(rank, float) and rank.is_integer():  # a column of numbers with gaps is one of floats
        rank = int(rank)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise RowError(f"rank {repr(rank)[:20]} is not a whole number from 1 to {MAX_RANK:,}")
    return rank


def _teacher_scores(row: dict, reading: Reading, positives: int, negatives: int) -> tuple[Sequence, Sequence]:
    """Return the scores of the positives and of the negatives; both empty if the row has none."""
    if reading.scores:
        scores = _scores(row, reading.scores, positives + negatives)
        return scores[:positives], scores[positives:]
    if not reading.positive_scores:
        return (), ()
    if not reading.negative_scores and negatives:
        raise RowError(f"{reading.positive_scores} without neg_scores")
    of_negatives = _scores(row, reading.negative_scores, negatives) if reading.negative_scores else ()
    return _scores(row, reading.positive_scores, positives), of_negatives


def _scores(row: dict, key: str, count: int) -> tuple[float, ...]:
    scores = row[key]
    if snake_case(key) == "score" and not (isinstance(scores, list) and len(scores) == count):
        raise RowError(
            f"{key} must be a list of {count} numbers beside negatives, a teacher's scores of the positive and then of "
            f"each negative; rewrite a margin M as `scores`: [M, 0], or leave the key unread (--ignore-keys {key})"
        )
    if not isinstance(scores, list) or len(scores) != count or not all(map(_is_finite, scores)):
        raise RowError(f"{key} must be {quantity(count, 'finite number')}, one for each document")
    return tuple(map(float, scores))


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # false for NaN, and for an integer beyond all floats


def _scored_documents(query: str, row: dict, reading: Reading) -> Example:
    """Return the example of documents that a teacher has scored: the best is the positive, the rest are negatives."""
    documents = _texts(row, reading.document)
    if len(documents) < 2:
        raise RowError("documents must be at least two texts")
    if reading.scores is None:
        raise RowError("no scores")
    scores = _scores(row, reading.scores, len(documents))
    order = sorted(range(len(documents)), key=lambda i: -scores[i])
    best, *rest = (documents[i] for i in order)
    return Example(query, best, tuple(rest), 1, tuple(scores[i] for i in order))
