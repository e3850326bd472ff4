"""Split questions by document: some are asked of the trained model, and it is not trained on their documents.

    split = split_rows(rows, share=0.05, seed=0)
    split.held                              # numbers of the rows that are asked
    questions_of(rows, split, chunks)       # as an evaluation folder has them

Questions of one document are alike, and so are its chunks: a model that was trained on some of them would know the
others. So whole documents are held out, drawn at random. A document with more than a tenth of the questions that are
wanted, such as one thick book, is cut into parts of RUN chunks that follow each other.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_retrieval.dataset import choice
from mlx_retrieval.dataset.documents.chunk import Chunk
from mlx_retrieval.dataset.held_out import Questions
from mlx_retrieval.mining.questions.store import CHUNK

RUN = 10  # chunks
DOCUMENTS = 1_000  # chunks that held-out questions are searched among, unless they have more of their own

_NUMBER = re.compile(r"#(\d+)$")  # of a chunk within its document


@dataclass(frozen=True)
class Split:
    """Which questions are trained on, and which are asked.

    Attributes:
        trained, held: numbers of rows, ascending.
        chunks: ids of all chunks of the parts that are held out, also of those without a question.
        reason: why none are held out; "" = some are.
    """

    trained: list[int]
    held: list[int]
    chunks: frozenset[str] = frozenset()
    reason: str = ""


def split_rows(rows: Sequence[dict[str, Any]], ids: Iterable[str], share: float, seed: int) -> Split:
    """Return which of the rows are held out: `choice.wanted` of them, or a few less.

    Args:
        rows: of questions, with the ids of their chunks.
        ids: of all chunks.
        share: of the questions.
    """
    target = choice.wanted(len(rows), share)
    everything = [*range(len(rows))]
    if not target:
        return Split(everything, [], reason=f"too few questions: {3 * choice.FEWEST} are needed")
    by_document: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        by_document[document_of(row[CHUNK])].append(number)
    large = {name for name, those in by_document.items() if len(those) > max(1, target // 10)}
    by_part: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        by_part[part_of(row[CHUNK], large)].append(number)
    parts = sorted(by_part)
    held: set[int] = set()
    names: set[str] = set()
    for i in np.random.default_rng([seed, 0xADA97]).permutation(len(parts)).tolist():
        those = by_part[parts[i]]
        if len(held) + len(those) <= target:
            held.update(those)
            names.add(parts[i])
        if len(held) == target:
            break
    if len(held) < choice.FEWEST:
        return Split(everything, [], reason="nearly all questions are of the same few chunks")
    chunks = frozenset(name for name in ids if part_of(name, large) in names)
    return Split([i for i in everything if i not in held], sorted(held), chunks)


def document_of(chunk: str) -> str:
    """Return the name of the document that a chunk's id belongs to."""
    return _NUMBER.sub("", chunk)


def part_of(chunk: str, large: set[str]) -> str:
    """Return the part of a document that is held out as a whole: all of it, unless it is one of the large ones."""
    document, number = document_of(chunk), _NUMBER.search(chunk)
    return f"{document}#{(int(number[1]) - 1) // RUN}" if document in large and number else document


def questions_of(rows: Sequence[dict[str, Any]], split: Split, chunks: Iterable[Chunk], seed: int) -> Questions:
    """Return the held-out questions, each with its chunk, among DOCUMENTS chunks.

    One question a chunk is asked: where the question was taken out of the chunk's text, its document is the rest.
    """
    answers: dict[str, dict[str, Any]] = {}
    for number in split.held:
        answers.setdefault(rows[number][CHUNK], rows[number])
    documents, others = {name: row["positive"] for name, row in answers.items()}, []
    texts = {*documents.values()}
    for chunk in chunks:
        if chunk.id not in documents and chunk.embedded not in texts:
            texts.add(chunk.embedded)
            others.append((chunk.id, chunk.embedded))
    room = max(0, DOCUMENTS - len(documents))
    drawn = np.random.default_rng([seed, 0xD0C5]).permutation(len(others))[:room]
    documents |= {others[i][0]: others[i][1] for i in sorted(drawn.tolist())}
    numbers = {name: f"d{i}" for i, name in enumerate(sorted(documents))}
    queries = {f"q{i}": row for i, row in enumerate(answers.values())}
    return Questions(
        {name: row["query"] for name, row in queries.items()},
        {numbers[name]: text for name, text in documents.items()},
        {name: [numbers[row[CHUNK]]] for name, row in queries.items()},
    )
