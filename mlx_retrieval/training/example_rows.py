"""The rows that a run's first lines show as the model will see them: prompts, special tokens, where a text is cut.

print_lines(example_lines(rows, tokenizer))

Texts are decoded from the token ids that go into the model, so a wrong prompt or a text that is cut short is seen.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.dataset.sources import Source
from mlx_retrieval.models.pair_tokenizers import PairTokenizer
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.console import MARGIN, Lines, console, shortened
from mlx_retrieval.utils.text import quantity

HEADING = "example"  # the name of the line above the texts of a row, whose names begin with a space
EXAMPLES = 2
SAMPLE, CHARACTERS = 200, 500_000  # rows and characters from which the share of cut texts is told
SCORES = 4  # of a teacher, that are shown


class Seen(NamedTuple):
    """A text as the model sees it, and its length in tokens; `full`: before truncation."""

    name: str
    text: str
    length: int
    full: int


def example_lines(
    rows: Source, tokenizer: TextTokenizer | PairTokenizer, random_negatives: int = 0, count: int = EXAMPLES
) -> Lines:
    """Return lines about `count` rows, and one or two that say how many texts of a sample are truncated.

    `random_negatives`: that each query gets besides those of its row.
    """
    sample = rows.preview(SAMPLE)
    examples = [
        (heading(place, example, rows.format, random_negatives), seen(example, tokenizer))
        for place, example in sample[:count]
    ]
    return [*_lines(examples), *(("truncated", line) for line in truncated(sample, len(rows), tokenizer))]


def without_examples(lines: Lines) -> Lines:
    """Return the lines but for those that show a row, for a page that is wider than the console."""
    return [(name, text) for name, text in lines if name != HEADING and not name.startswith(" ")]


def conversation_lines(place: str, ids: list[int], trained: list[bool], decode: Callable[[list[int]], str]) -> Lines:
    """Return lines about a conversation: its text, and the first part that is trained on.

    `trained`: of each token, whether it is trained on.
    """
    texts = [Seen(" text", decode(ids), len(ids), len(ids))]
    if not all(trained):
        first = trained.index(True)
        last = trained.index(False, first) if False in trained[first:] else len(ids)
        texts.append(Seen(" trained on", decode(ids[first:last]), sum(trained), len(ids)))
    return _lines([(_shorter(place), texts)])


def heading(place: str, example: Example, kind: str | None, random_negatives: int = 0) -> str:
    """Return the place of a row, and of its negatives, label, rank and scores those that it has."""
    facts = [_shorter(place)]
    if example.other_positives:
        facts.append(f"one of its {len(example.other_positives) + 1} positives")
    if example.negatives:
        facts.append(quantity(len(example.negatives), "negative"))
    if random_negatives:
        facts.append(quantity(random_negatives, "random negative"))
    if kind == "label":
        facts.append(f"label {example.scores[0]:g}")
    elif example.scores:
        more = ", ..." if len(example.scores) > SCORES else ""
        facts.append("scores " + ", ".join(f"{score:.4g}" for score in example.scores[:SCORES]) + more)
    if example.rank > 1:
        facts.append(f"rank {example.rank}")
    return ", ".join(facts)


def seen(example: Example, tokenizer: TextTokenizer | PairTokenizer) -> list[Seen]:
    """Return an example's texts as the model sees them: query, document and the first negative."""
    negatives = [(" negative", text) for text in example.negatives[:1]]
    if isinstance(tokenizer, PairTokenizer):
        query, document = tokenizer.parts(example.query, example.positive)
        parts = [(" query", query), (" document", document)]
        parts += [(name, tokenizer.parts(example.query, text)[1]) for name, text in negatives]
        return [Seen(name, *part) for name, part in parts]
    texts = [(" query", "query", example.query), (" document", "document", example.positive)]
    return [_text(*each, tokenizer) for each in [*texts, *((name, "document", text) for name, text in negatives)]]


def truncated(sample: Sequence[tuple[str, Example]], rows: int, tokenizer: TextTokenizer | PairTokenizer) -> list[str]:
    """Return lines that say how many texts of a sample of the `rows` rows are truncated, and at which length."""
    examples, characters = [], 0
    for _, example in sample:
        examples.append(example)
        characters += sum(map(len, (example.query, example.positive, *example.negatives)))
        if characters >= CHARACTERS:
            break
    looked_at = f"in a sample of {quantity(len(examples), 'row')}" if len(examples) < rows else "in all rows"
    if isinstance(tokenizer, PairTokenizer):
        pairs = [(e.query, [e.positive, *e.negatives]) for e in examples]
        counts = [("document", sum(len(texts) for _, texts in pairs), tokenizer(pairs).cut, tokenizer.max_length)]
    else:
        sides = {"query": [e.query for e in examples]}
        sides["document"] = [text for e in examples for text in (e.positive, *e.negatives)]
        counts = [(name, len(texts), *_cut(texts, name, tokenizer)) for name, texts in sides.items()]
    cut = [f"{n:,} of {quantity(count, name)} at {limit} tokens, {looked_at}" for name, count, n, limit in counts if n]
    return cut or [f"no text {looked_at}"]


def _cut(texts: Sequence[str], name: str, tokenizer: TextTokenizer) -> tuple[int, int]:
    """Return how many texts are longer than the limit of the prompt called `name`, and that limit."""
    limit = tokenizer.max_lengths[name]
    room = limit - len(tokenizer.opening) - len(tokenizer.closing)
    return sum(len(ids) > room for ids in tokenizer.bodies(texts, tokenizer.prompts.get(name, ""))), limit


def _text(shown: str, name: str, text: str, tokenizer: TextTokenizer) -> Seen:
    ids = tokenizer([text], name).ids.tolist()
    (body,) = tokenizer.bodies([text], tokenizer.prompts.get(name, ""))
    full = len(tokenizer.opening) + len(body) + len(tokenizer.closing)
    return Seen(shown, _decoded(ids, tokenizer), len(ids), max(full, len(ids)))


def _decoded(ids: list[int], tokenizer: TextTokenizer) -> str:
    return tokenizer.tokenizer.decode(ids, skip_special_tokens=False)


def _shorter(place: str) -> str:
    """Return a place relative to the current folder if it is below it."""
    return place.removeprefix(f"{Path.cwd()}/")


def _lines(examples: Sequence[tuple[str, Sequence[Seen]]]) -> Lines:
    """Return a heading and a line a text for each example; the texts begin in one column and fit the console."""
    figures = [[_figure(one) for one in texts] for _, texts in examples]
    width = max((len(figure) for row in figures for figure in row), default=0)
    room = max(console().width - MARGIN - width - 3, 20)
    lines = []
    for (name, texts), row in zip(examples, figures, strict=True):
        lines.append((HEADING, shortened(name, console().width - MARGIN)))
        lines += [
            (one.name, f"{figure:<{width}}   {shortened(one.text, room)}")
            for one, figure in zip(texts, row, strict=True)
        ]
    return lines


def _figure(one: Seen) -> str:
    if one.length < one.full:
        return f"{one.length:,} of {one.full:,} tokens"
    return quantity(one.length, "token")
