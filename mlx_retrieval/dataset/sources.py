"""Open the rows that `--data` names: files, folders, hub data sets, Elasticsearch indices, or a mixture of them.

    pairs.jsonl folder/ rows.csv            read together, as one set; row_files.py lists the formats
    hf://owner/name[/config][:split]        through the datasets library; the split is train if none is named
    es://index, https://host:9200/index     streamed, see elastic/
    a.jsonl:2 b.jsonl:1                     mixed by weight: of three examples, two are of a.jsonl

`Source` is the interface that all of them have.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mlx_retrieval.dataset.columns import ELASTIC_DEFAULT, check_roles
from mlx_retrieval.dataset.columns import parse as parse_columns
from mlx_retrieval.dataset.contents import Content
from mlx_retrieval.dataset.elastic import server
from mlx_retrieval.dataset.elastic.rows import ElasticRows
from mlx_retrieval.dataset.json_lines import RowError, parse_object
from mlx_retrieval.dataset.row_formats import Example, without
from mlx_retrieval.dataset.row_store import RowStore
from mlx_retrieval.dataset.rows import Rows, find_files
from mlx_retrieval.utils import addresses, toolkit
from mlx_retrieval.utils.errors import Place, UserError
from mlx_retrieval.utils.text import CHECKOUT

WEIGHT = re.compile(r":(\d+(?:\.\d+)?)$")
LARGEST = 100_000  # turns of a mixture's pattern, about, so that weights of many digits do not make it long


@runtime_checkable
class Source(Protocol):
    """Checked examples of training data in an endless, seeded order: what `data_loader.Batches` draws from.

    `rows.Rows` reads files, `elastic.rows.ElasticRows` an index, `InterleavedRows` several sources at once.

    An example has a number, by which it is read and named in messages; `numbers` gives the order of the run. A row
    with several positives is as many examples. A run's position is the count of examples drawn before. A source whose
    order does not follow from the position alone saves a cursor (JSON) as well, so that a resumed run draws the same.
    """

    @property
    def format(self) -> str | None:
        """One of `row_formats.KINDS`; all rows have it."""

    @property
    def has_negatives(self) -> bool:
        """Whether any row has negatives of its own."""

    @property
    def has_scores(self) -> bool:
        """Whether every row has scores or a label."""

    @property
    def has_some_scores(self) -> bool:
        """Whether any row has scores or a label."""

    @property
    def score_range(self) -> tuple[float, float]:
        """Lowest and highest score or label, and at least from 0 to 1."""

    @property
    def without_positive(self) -> Place | None:
        """Place of the first row whose scores are all 0 or less; None if there is none."""

    @property
    def skipped(self) -> list[str]:
        """Rows that were left out because they cannot be used, as "place: reason"."""

    @property
    def ignored(self) -> Counter[str]:
        """Keys of rows that are not read, and how many rows have them."""

    @property
    def readings(self) -> list[str]:
        """How the rows were read, as `pairs.csv: question -> query, answer -> document`, in a line or a few."""

    @property
    def names(self) -> list[str]:
        """Where the rows come from, for messages."""

    @property
    def constant(self) -> dict[str, str]:
        """Query, positive or label, by that name, if all rows have the same; of an index, the first hundred."""

    def __len__(self) -> int:
        """Return the number of examples of an epoch."""

    def __getitem__(self, i: int) -> Example:
        """Return the example of a number that `numbers` gave."""

    def where(self, i: int) -> str:
        """Return the place of an example's row for messages, such as file:line."""

    def numbers(self, seed: int, position: int) -> Iterator[int]:
        """Yield numbers of examples, epoch after epoch, from a position of the run on, until `close` is called."""

    def cursor(self, position: int) -> dict[str, Any]:
        """Return what `restore` needs, besides the position, to continue there in another process."""

    def restore(self, cursor: dict[str, Any], position: int) -> None:
        """Continue at a position as the process that saved the cursor would have."""

    def preview(self, count: int) -> list[tuple[str, Example]]:
        """Return (place, example) of `count` rows at most, to be looked at: the first two and some of all others.

        The order that `numbers` gives stays as it is.
        """

    def contents(self) -> list[Content]:
        """Return what each file held when it was read, and the identity of each index."""

    def close(self) -> None:
        """Stop reading ahead and release connections."""


def weight_of(source: str) -> tuple[str, Fraction | None]:
    """Return a source without its weight, and the weight or None; a port is not a weight."""
    match = WEIGHT.search(source)
    if not match or (source.startswith("http") and addresses.split(source).path in ("", "/")):
        return source, None
    if (weight := Fraction(match[1])) == 0:
        raise UserError(f"--data {source}: a weight of 0")
    return source[: match.start()], weight


def names(data: Sequence[str]) -> list[str]:
    """Return the sources that `--data` names, without weights."""
    return [weight_of(source)[0] for source in data]


def local(data: Sequence[str]) -> list[str]:
    """Return the sources that are files or folders, without weights."""
    return [name for name in names(data) if "://" not in name]


def is_default_data(data: Sequence[str]) -> bool:
    """Return whether `--data` is the toolkit's own `train-data.jsonl`, and not a user's data: by any path, and alone.

    A user's file of the same name is the user's data.
    """
    paths, own = [Path(name).expanduser() for name in local(data)], CHECKOUT / toolkit.DATA
    return len(data) == len(paths) == 1 and paths[0].is_file() and own.is_file() and paths[0].samefile(own)


@dataclass(frozen=True)
class ReadOptions:
    """How rows are read and mixed.

    Attributes:
        columns: the keys of a row and the columns they are made of (`--columns`); None = rows by their own names, and
            the documents of an index as columns.ELASTIC_DEFAULT says.
        es_query: a JSON query that documents must match (`--es-query`); None = all documents.
        skip_bad: leave out rows that cannot be used, instead of raising.
        ignore_keys: keys of rows that are treated as absent (`--ignore-keys`); an index's rows have those of `columns`.
        block: examples that follow each other from one source of a mixture.
        temperature: mix sources by their number of examples to the power of 1 / temperature; None = by their weights.
    """

    columns: str | None = None
    es_query: str | None = None
    skip_bad: bool = False
    ignore_keys: Collection[str] = ()
    block: int = 1
    temperature: float | None = None


AS_THEY_ARE = ReadOptions()
Part = tuple[Sequence[str], Fraction | None]  # files that are read as one set, or one index; and their weight


def open_source(data: Sequence[str], options: ReadOptions = AS_THEY_ARE) -> Source:
    """Open the rows that `--data` names: files, folders, hub data sets and indices, each with a weight or without.

    Raises UserError for a wrong option and, unless bad rows are skipped, for the first row that cannot be used.
    """
    parts = [weight_of(source) for source in data]
    weighted, temperature = any(weight for _, weight in parts), options.temperature
    _check_temperature(temperature, weighted, len(parts), "in --data")
    _check_query(options, [source for source, _ in parts])
    mixes = weighted or temperature is not None or any(server.is_address(source) for source, _ in parts)
    if len(parts) == 1 or not mixes:
        return _open([source for source, _ in parts], options)
    mixture = _mixed([([source], weight) for source, weight in parts], options)
    _check_labels(mixture, "`sources:` in a file of settings (--config) gives each its own loss")
    return mixture


def _check_labels(mixture: "InterleavedRows", way_on: str) -> None:
    """Raise UserError if some sources of a mixture have labels, and others do not."""
    if len(formats := {source.format for source in mixture.sources}) > 1 and "label" in formats:
        raise UserError(f"{', '.join(mixture.names)}: rows with a label do not mix with others; {way_on}")


def _check_temperature(temperature: float | None, weighted: bool, count: int, where: str) -> None:
    """Raise UserError if a temperature has nothing to decide; `where` the weights are, in words."""
    if temperature is not None and (weighted or count < 2):
        reason = f"the weights {where} say how sources are mixed" if weighted else "there is one source to draw from"
        raise UserError(f"--source-temperature {temperature:g}: {reason}")


def _check_query(options: ReadOptions, sources: Sequence[str]) -> None:
    """Raise UserError for a query of Elasticsearch if none of these sources is an index."""
    if options.es_query and not any(map(server.is_address, sources)):
        raise UserError("--es-query: none of the sources is an index, es://name; files are read whole")


def open_mixture(parts: Sequence[Part], options: ReadOptions = AS_THEY_ARE) -> "InterleavedRows":
    """Open sources that are mixed; without weights and a temperature by their sizes. Errors as of `open_source`."""
    weighted = any(weight for _, weight in parts)
    _check_temperature(options.temperature, weighted, len(parts), "of the sources")
    _check_query(options, [path for paths, _ in parts for path in paths])
    by_size = options if weighted else replace(options, temperature=options.temperature or 1.0)
    mixture = _mixed(parts, by_size)
    if options.block == 1:
        _check_labels(mixture, "--batches homogeneous and a --batch-size above 1 keep them apart")
    return mixture


def _mixed(parts: Sequence[Part], options: ReadOptions) -> "InterleavedRows":
    """Return a mixture by the parts' weights, or by their sizes if there is a temperature."""
    store = RowStore()
    opened = [_open(paths, options, store, check_columns=False) for paths, _ in parts]
    if mappers := [source.mapper for source in opened if isinstance(source, Rows)]:
        mappers[0].check(mappers[1:])
    if options.temperature is not None:
        weights = [Fraction(len(source) ** (1 / options.temperature)) for source in opened]
    else:
        weights = [weight or Fraction(1) for _, weight in parts]
    return InterleavedRows(opened, weights, options.block)


def _open(
    sources: Sequence[str], options: ReadOptions, store: RowStore | None = None, check_columns: bool = True
) -> Source:
    """Open files that are read as one set, or an index; `store` and `check_columns` as of `Rows`."""
    columns = None if options.columns is None else parse_columns(options.columns)
    if not server.is_address(sources[0]):
        return Rows(find_files(sources), options.skip_bad, options.ignore_keys, columns, check_columns, store)
    query = None
    if options.es_query:
        try:
            query = parse_object(options.es_query)
        except RowError as error:
            raise UserError(f"--es-query: {error} (needed: a query of Elasticsearch as a JSON object)") from error
    chosen = without(columns or parse_columns(ELASTIC_DEFAULT), options.ignore_keys)
    check_roles(chosen)
    return ElasticRows(server.parse(sources[0]), chosen, query, options.skip_bad)


class InterleavedRows:
    """Rows of several sources, mixed by weight. Each source goes through its own epochs.

    Args:
        sources: some may have labels and others none, if each batch comes from one and has its own loss.
        weights: the share of each source's examples, in proportion.
        block: examples that follow each other from one source, so that a batch of as many comes from one.

    Sources take turns in a fixed pattern, so a position in the mixture gives the position in every source. The number
    of a row is its number in its source times the count of sources, plus the index of the source.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[Fraction], block: int = 1):
        self.sources, self.block = list(sources), block
        shares = [weight / sum(weights) for weight in weights]
        common = min(math.lcm(*(share.denominator for share in shares)), LARGEST)
        self.counts = np.array([max(1, round(share * common)) for share in shares])
        length = int(self.counts.sum())
        # Each source is spread evenly over the pattern: example j of n stands near (j + 1/2) / n of its length.
        places = [((j + 0.5) / n, s) for s, n in enumerate(self.counts.tolist()) for j in range(n)]
        self.pattern = np.array([s for _, s in sorted(places)])
        self._before = np.zeros((length + 1, len(sources)), np.int64)  # examples of each source before a place
        np.add.at(self._before, (np.arange(1, length + 1), self.pattern), 1)
        self._before = self._before.cumsum(axis=0)

    @property
    def format(self) -> str:
        """That of the first source without labels, if there is one."""
        formats = [source.format for source in self.sources]
        return next((kind for kind in formats if kind != "label"), formats[0])

    @property
    def has_negatives(self) -> bool:
        return any(source.has_negatives for source in self.sources)

    @property
    def has_scores(self) -> bool:
        return all(source.has_scores for source in self.sources)

    @property
    def has_some_scores(self) -> bool:
        return any(source.has_some_scores for source in self.sources)

    @property
    def score_range(self) -> tuple[float, float]:
        low, high = zip(*(source.score_range for source in self.sources), strict=True)
        return min(low), max(high)

    @property
    def without_positive(self) -> Place | None:
        return next(filter(None, (source.without_positive for source in self.sources)), None)

    @property
    def skipped(self) -> list[str]:
        return [line for source in self.sources for line in source.skipped]

    @property
    def ignored(self) -> Counter[str]:
        return sum((source.ignored for source in self.sources), Counter())

    @property
    def readings(self) -> list[str]:
        return [line for source in self.sources for line in source.readings]

    @property
    def names(self) -> list[str]:
        return [name for source in self.sources for name in source.names]

    @property
    def constant(self) -> dict[str, str]:
        return dict(set.intersection(*(set(source.constant.items()) for source in self.sources)))

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, i: int) -> Example:
        place, which = divmod(i, len(self.sources))
        return self.sources[which][place]

    def source_of(self, i: int) -> int:
        """Return which source an example is from, counted from 0."""
        return i % len(self.sources)

    def first_turns(self) -> list[int]:
        """Return each source's first turn, counted from 0: with batches of `block` examples, the first batch of it."""
        return [int(np.argmax(self.pattern == s)) for s in range(len(self.sources))]

    def where(self, i: int) -> str:
        place, which = divmod(i, len(self.sources))
        return self.sources[which].where(place)

    def taken(self, position: int) -> list[int]:
        """Return how many examples of each source come before a position."""
        turn, within = divmod(position, self.block)
        rounds, place = divmod(turn, len(self.pattern))
        before = (rounds * self.counts + self._before[place]) * self.block
        before[self.pattern[place]] += within
        return before.tolist()

    def numbers(self, seed: int, position: int) -> Iterator[int]:
        drawn = [source.numbers(seed, at) for source, at in zip(self.sources, self.taken(position), strict=True)]
        for place in itertools.count(position):
            which = int(self.pattern[place // self.block % len(self.pattern)])
            if (number := next(drawn[which], None)) is None:  # the source was closed
                return
            yield number * len(self.sources) + which

    def preview(self, count: int) -> list[tuple[str, Example]]:
        share = -(-count // len(self.sources))
        turns = itertools.zip_longest(*(source.preview(share) for source in self.sources))
        return [row for turn in turns for row in turn if row is not None][:count]

    def cursor(self, position: int) -> dict:
        return {str(s): source.cursor(at) for s, (source, at) in enumerate(self._places(position))}

    def restore(self, cursor: dict, position: int) -> None:
        for s, (source, at) in enumerate(self._places(position)):
            source.restore(cursor[str(s)], at)

    def contents(self) -> list[Content]:
        return [content for source in self.sources for content in source.contents()]

    def _places(self, position: int) -> list[tuple[Source, int]]:
        return list(zip(self.sources, self.taken(position), strict=True))

    def close(self) -> None:
        for source in self.sources:
            source.close()
