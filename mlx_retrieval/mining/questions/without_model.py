"""Questions without a model: what chunks ask themselves, titles, headings, first sentences and spans serve as queries.

    generator = WithoutModel(count=2)
    for lot in generator.answers(job for chunk in chunks for job in generator.jobs(chunk)): ...

| style | the query | the document |
|---|---|---|
| question | a question that the chunk asks itself, as FAQs and leaflets do | the chunk without it |
| title | the document's title | the chunk, without context and lines that repeat the title or a heading |
| headings | title and headings | the same |
| sentence | the chunk's first sentence | the chunk without it |
| span | another sentence (inverse cloze task: Lee et al. 2019, arXiv 1906.00300) | the chunk without it |
| crop | some of its words (independent cropping: Izacard et al. 2022, arXiv 2112.09118) | others, drawn independently |

A query that stands in its document teaches nothing but to compare words, so it is removed there in nine of ten cases,
as Lee et al. do; in the tenth it stays, as exact matches occur in real searches as well. Crops overlap by chance
instead. Their documents are half of the chunk or more, longer than the paper's: searches will compare whole chunks.
A question is what a person may really ask, so a chunk that has some gives these alone, as many as are wanted. From the
others, queries of the other styles are drawn.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from mlx_retrieval.dataset.documents.chunk import Chunk
from mlx_retrieval.dataset.text_keys import words_of
from mlx_retrieval.mining.questions.base import WORD, Answer, Job, Question, check_styles, digest, drawn, rng_of

NAME = "none"
REMOVED = 0.9  # share of queries that are removed from their documents
FEWEST, LONGEST = 4, 32  # words of a query that is a part of a chunk
FEWEST_ASKED = 3  # words of a question: "Is it inherited?"
QUESTION, QUESTION_MARKS = "question", "?？؟⸮"
HEADS = ("title", "headings")  # styles whose queries may stand in the context that a chunk is embedded with
MARKS = " -*•–—·>|,;"  # of lists, tables and clauses that a query would begin with
REST = 8  # words that a document has at least
JOBS = 512  # of a lot
VERSION = 2  # greater when other questions are made of the same chunks

_SENTENCE = re.compile(r"\S.*?(?:[.!?؟⸮](?=\s)|[。！？]|\n\s*\n|\Z)", re.DOTALL)
_CODE = re.compile(r"[=;{}<>&|]|\(\)|\w\((?!s\))")
_MARK = re.compile(r"^[\s#=*_]+|[\s#=*_:]+$")  # around a heading in plain text and markdown

Part = tuple[str, str]  # the query, and the rest of the text


class WithoutModel:
    """Makes queries of a chunk's own questions, or else one in each of `count` styles, drawn from those that it has.

    Args:
        styles: those to draw from.
        count: queries a chunk, at most.
        seed: decides styles, spans and what is removed.

    Raises UserError for an unknown style or a count that is not from 1 to MOST.
    """

    name, shortened = NAME, frozenset()

    def __init__(self, styles: Sequence[str] = (), count: int = 2, seed: int = 0):
        self.styles, self.count, self.seed = tuple(styles) or STYLES, count, seed
        check_styles(self.styles, STYLES, count)

    def jobs(self, chunk: Chunk) -> list[Job]:
        """Return the jobs of a chunk; none if it is too short."""
        body = _body(chunk)
        if len(WORD.findall(body)) < REST:
            return []
        if QUESTION in self.styles and (asked := _asked(chunk, body, self.count)):
            return [Job(chunk, QUESTION, len(asked))]
        available = [style for style in self.styles if _part(chunk, body, style, self.seed)]
        return [Job(chunk, style) for style in drawn(available, self.count, chunk, self.seed)]

    def prompt_digest(self, job: Job) -> str:
        """Return a hash of the seed: nothing else decides a query."""
        return digest(NAME, VERSION, self.seed)

    def answers(self, jobs: Iterable[Job]) -> Iterator[list[Answer]]:
        """Yield the answers to all jobs."""
        jobs = iter(jobs)
        while lot := [*islice(jobs, JOBS)]:
            yield [Answer(job, [*self._questions(job)]) for job in lot]

    def _questions(self, job: Job) -> Iterator[Question]:
        chunk, style, body = job.chunk, job.style, _body(job.chunk)
        is_asked = style == QUESTION
        parts = _asked(chunk, body, job.count) if is_asked else [_part(chunk, body, style, self.seed)]
        removing = rng_of(chunk, self.seed, f"{style}, removed")
        for query, rest in parts:
            is_removed = style == "crop" or removing.random() < REMOVED
            document = rest if style in HEADS else replace(chunk, text=rest).embedded
            positive = document if is_removed and document != chunk.embedded else None
            yield Question(chunk.id, style, query.lstrip(MARKS) or query, positive)


def asks(chunk: Chunk) -> bool:
    """Return whether a chunk has a question of its own."""
    return bool(_asked(chunk, _body(chunk), 1))


def _body(chunk: Chunk) -> str:
    """Return the text of a chunk without the lines at its beginning that repeat the title or a heading."""
    heads = {words_of(head) for head in (chunk.title, *chunk.headings) if head.strip()}
    text = chunk.text.strip()
    while heads and text:
        line, _, rest = text.partition("\n")
        if words_of(_MARK.sub("", line)) not in heads and line.strip("=- \t"):  # a line below a heading
            break
        text = rest.lstrip()
    return text


def _asked(chunk: Chunk, body: str, count: int) -> list[Part]:
    """Return the first `count` questions that a chunk asks, each with the rest of the chunk."""
    asked = (sentence.span() for sentence in _SENTENCE.finditer(body) if _is_question(sentence[0]))
    parts = (_without(body, *span, FEWEST_ASKED) for span in asked)
    return [*islice(filter(_is_enough, parts), count)]


def _is_question(sentence: str) -> bool:
    """Return whether a sentence is a question of at most LONGEST words, and no conditional expression of a program."""
    is_asked = sentence.endswith((*QUESTION_MARKS,)) and len(WORD.findall(sentence)) <= LONGEST
    return is_asked and not _CODE.search(sentence.lstrip(MARKS))


def _part(chunk: Chunk, body: str, style: str, seed: int) -> Part | None:
    """Return the query of a style, and what is left of the chunk; None if the chunk has no such query."""
    part = None if style == QUESTION else _PARTS[style](chunk, body, rng_of(chunk, seed, style))
    return part if _is_enough(part) else None


def _is_enough(part: Part | None) -> bool:
    """Return whether there is a query, and enough text left to lead to."""
    return part is not None and len(WORD.findall(part[1])) >= REST


def _title(chunk: Chunk, body: str, _: np.random.Generator) -> Part | None:
    return (chunk.title.strip(), body) if chunk.title.strip() else None


def _headings(chunk: Chunk, body: str, _: np.random.Generator) -> Part | None:
    path = {words_of(head): head.strip() for head in (chunk.title, *chunk.headings) if head.strip()}
    return (": ".join(path.values()), body) if chunk.headings and path else None


def _sentence(chunk: Chunk, body: str, _: np.random.Generator) -> Part | None:
    first = next(_SENTENCE.finditer(body), None)
    return _without(body, *first.span()) if first else None


def _span(chunk: Chunk, body: str, rng: np.random.Generator) -> Part | None:
    others = [*_SENTENCE.finditer(body)][1:]
    parts = [part for sentence in others if (part := _without(body, *sentence.span()))]
    return parts[int(rng.integers(len(parts)))] if parts else None


def _without(body: str, start: int, end: int, fewest: int = FEWEST) -> Part | None:
    """Return a part of a text, at most LONGEST words of it, and the text without it; None if it has too few words."""
    words = [*WORD.finditer(body, start, end)]
    if len(words) < fewest:
        return None
    end = words[:LONGEST][-1].end()
    rest = f"{body[:start].rstrip()} {body[end:].lstrip()}".strip()
    return " ".join(body[start:end].split()), rest


def _crop(chunk: Chunk, body: str, rng: np.random.Generator) -> Part | None:
    words = [*WORD.finditer(body)]
    if len(words) < 2 * FEWEST:
        return None
    most = min(LONGEST, len(words) // 2)
    runs = []
    for fewest, most_words in ((FEWEST, most), (max(REST, len(words) // 2), len(words))):
        length = int(rng.integers(fewest, most_words + 1))
        first = int(rng.integers(len(words) - length + 1))
        runs.append(body[words[first].start() : words[first + length - 1].end()])
    return " ".join(runs[0].split()), runs[1]


_PARTS: dict[str, Callable[[Chunk, str, np.random.Generator], Part | None]] = {
    "title": _title,
    "headings": _headings,
    "sentence": _sentence,
    "span": _span,
    "crop": _crop,
}
STYLES = (QUESTION, *_PARTS)
