"""Conversations on disk -> token ids and masks -> batches of about equal lengths.

Rows are JSON objects, or those of tables, in files of any format of dataset/row_files.py:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}    tools are optional
    {"prompt": "...", "completion": "..."}
    {"text": "..."}

Every row is checked and tokenised once, before training. An epoch is a seeded permutation; pools of a few batches are
sorted by length and split into batches, which come in seeded order. Batch k is computed from k alone, so a run can
continue anywhere. No row is dropped: an epoch's last batch may be smaller.
"""

import hashlib
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np

from mlx_retrieval.dataset import roles
from mlx_retrieval.dataset.contents import Content
from mlx_retrieval.dataset.json_lines import RowError, parse_object
from mlx_retrieval.dataset.row_files import HUB, RowFile, first_row
from mlx_retrieval.dataset.rows import find_files
from mlx_retrieval.dataset.sources import names
from mlx_retrieval.dataset.unread_keys import is_origin
from mlx_retrieval.training.chat.messages import dialogue_of, text_of, unread_keys, without_keys
from mlx_retrieval.training.chat.template import ChatTokenizer, Rendered
from mlx_retrieval.utils.errors import UserError

FORMATS = {"messages": "messages", "prompt": "prompt and completion", "text": "text"}
POOL = 50  # batches that are sorted by length together
# Padded lengths are multiples of this, and at most so many different ones: mlx-lm compiles a step for every shape, and
# mlx keeps all of them, each with some 500 of the 499,000 resources that Metal has. See `padded_widths`.
GRID, WIDTHS = 16, 128
CHUNK = 512  # conversations that are tokenised at once


# --- rows -----------------------------------------------------------------------------------------------------------


def row_format(row: dict) -> str | None:
    """Return the format of a row, by its keys that are not null; None if it is not a conversation."""
    keys = {key for key, value in row.items() if value is not None}
    if roles.MESSAGES in keys:
        return None if roles.POSITIVE_MESSAGES in keys else "messages"
    if keys >= {"prompt", "completion"}:
        return "prompt"
    return "text" if "text" in keys and not {*roles.ROLES["query"]} & keys else None


def is_chat(sources: Sequence[str]) -> bool:
    """Return whether the first row of `--data` is a conversation, or a `text` without another text beside it.

    Unreadable files are left for the run to report.
    """
    name = names(sources[:1])[0]
    if "://" in name and not name.startswith(HUB):
        return False
    file = find_files([name])[0]
    try:
        row = first_row(file)
    except UserError:
        return False
    if not isinstance(row, dict) or (form := row_format(row)) is None:
        return False
    others = [
        key for key in row if key != "text" and isinstance(row[key], str) and not is_origin(roles.snake_case(key))
    ]
    return form != "text" or not others  # a title and a text may be rows for retrieval, under other names


def _render(row: dict, kind: str | None, tokenizer: ChatTokenizer, mask_prompt: bool) -> Rendered:
    form = row_format(row)
    if form is None:
        keys = ", ".join(sorted(row)) or "(none)"
        raise RowError(f"keys {keys} fit no conversation (messages; prompt and completion; text)")
    if form != kind:
        raise RowError(f"has the format {FORMATS[form]}, but the rows before have {FORMATS[kind]}")
    if kind == "text":
        text = text_of(row["text"], "text")
        return Rendered(text, [(0, len(text))], plain=True)
    return tokenizer.render(dialogue_of(row), mask_prompt)


class Conversations:
    """The tokenised rows of some files.

    Args:
        files: see dataset/row_files.py.
        limit: truncate conversations to this many tokens.
        mask_prompt: train on the assistant's turns only.
        skip_bad: leave out rows that cannot be used; `skipped` lists them, as "file:line: reason".
        ignore_keys: keys of rows and of messages that are treated as absent.

    Attributes:
        ids: for each conversation, its tokens (N,) int32.
        trained: for each conversation, the tokens that are trained on (N,) bool.
        lengths: (conversations,) int64.
        truncated: how many were longer than the limit.
        longest: tokens of the longest one before truncation.
        empty: how many were left out, as nothing to train on is within the limit.
        last_only: how many are trained on their last turn only.
        ignored: keys that are not read, and in how many rows.
        contents: of the files.

    Raises UserError with file, line and reason at the first bad row, or if no row is left.
    """

    def __init__(
        self,
        files: Sequence[Path],
        tokenizer: ChatTokenizer,
        limit: int,
        mask_prompt: bool = False,
        skip_bad: bool = False,
        ignore_keys: Collection[str] = (),
    ):
        self.ids: list[np.ndarray] = []
        self.trained: list[np.ndarray] = []
        self.skipped: list[str] = []
        self.contents: list[Content] = []
        self.truncated = 0
        self.longest = 0
        self.empty = 0
        self.last_only = 0
        self.ignored: Counter[str] = Counter()
        self._tokenizer = tokenizer
        self._limit = limit
        self._ignore_keys = frozenset(ignore_keys)
        self._places: list[str] = []
        kind: str | None = None
        waiting: list[tuple[str, Rendered]] = []
        for file in files:
            for place, row in self._rows(file, skip_bad):
                try:
                    expected = kind or row_format(row)
                    if expected == "text" and mask_prompt:
                        raise UserError(f"{place}: --mask-prompt is for conversations; a row with text has no prompt")
                    rendered = _render(row, expected, tokenizer, mask_prompt)
                    self.ignored.update(unread_keys(row, expected, tokenizer.reads))
                    waiting.append((place, rendered))
                    kind = expected
                except RowError as error:
                    self._refuse(place, error, skip_bad)
                if len(waiting) == CHUNK:
                    self._add(waiting, skip_bad)
                    waiting = []
        self._add(waiting, skip_bad)
        if not self.ids:
            left_out = f": nothing to train on is within --max-length {limit}" if self.empty else ""
            raise UserError(f"{', '.join(map(str, files))}: no usable row{left_out}")
        self.lengths = np.array([len(ids) for ids in self.ids], np.int64)

    def _rows(self, file: Path, skip_bad: bool) -> Iterator[tuple[str, dict]]:
        digest, count = hashlib.sha256(), 0
        with RowFile(file) as opened:
            for line in opened.lines():
                place = f"{file}:{line.number}"
                digest.update(line.data)
                count += 1
                try:
                    yield place, without_keys(parse_object(line.data), self._ignore_keys)
                except RowError as error:
                    self._refuse(place, error, skip_bad)
        self.contents.append(Content(str(file), count, "conversations", digest.hexdigest()))

    def _refuse(self, place: str, error: RowError, skip_bad: bool) -> None:
        if not skip_bad:
            raise UserError(f"{place}: {error} (--skip-bad-rows leaves such rows out)") from error
        self.skipped.append(f"{place}: {error}")

    def _add(self, waiting: list[tuple[str, Rendered]], skip_bad: bool) -> None:
        tokens = self._tokenizer.tokens([rendered for _, rendered in waiting]) if waiting else []
        for (place, rendered), (ids, trained) in zip(waiting, tokens, strict=True):
            if unknown := self._tokenizer.unknown(ids):  # mlx would crash, or read past the end
                self._refuse(place, RowError(f"the model has no vector for the token {unknown}"), skip_bad)
                continue
            self.longest = max(self.longest, len(ids))
            self.truncated += len(ids) > self._limit
            ids = ids[: self._limit]
            trained = trained[: self._limit]
            if not trained[1:].any():  # nothing predicts the first token
                self.empty += 1
                continue
            self.last_only += not rendered.complete
            self.ids.append(ids)
            self.trained.append(trained)
            self._places.append(place)

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, i: int) -> str:
        """Return the row's place as file:line."""
        return self._places[i]

    @property
    def checksum(self) -> int:
        """A checksum of tokens and masks."""
        value = 0
        for ids, trained in zip(self.ids, self.trained, strict=True):
            value = zlib.crc32(trained.tobytes(), zlib.crc32(ids.tobytes(), value))
        return value


def padded_widths(longest: int) -> list[int]:
    """Return the padded lengths of conversations of up to `longest` positions, ascending, `WIDTHS` of them at most.

    Multiples of GRID; where those are too many, longer ones are wider apart: a 32nd of the next smaller power of two,
    or a 16th or an 8th, so that padding takes no more than that share.
    """
    share = WIDTHS
    while True:
        widths, last = [], 0
        while last < longest:
            last = min(last + max(GRID, 2 ** (last.bit_length() - 1) // share if last else 0), longest)
            widths.append(last)
        if len(widths) <= WIDTHS:
            return widths or [1]
        share //= 2


# --- batches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A batch, or a micro-batch of one, as the loss takes it."""

    ids: mx.array  # (R, L + 1) int32, right-padded
    counted: mx.array  # (R, L) bool: whether ids[:, 1:] is trained on there
    share: mx.array  # float32 scalar: the divisor of the sum of losses

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        return self.ids, self.counted, self.share


@dataclass(frozen=True)
class Counts:
    """Numbers of tokens in a batch."""

    tokens: int  # real tokens, without padding
    trained: int  # tokens that are predicted and counted in the loss
    padded: int  # tokens that go through the model, padding included


class ChatBatches:
    """An endless, seeded sequence of batches; `per_epoch` of them hold every conversation once.

    Args:
        size: conversations of a batch, at most all.
        parts: split every batch into this many micro-batches, whose mean loss is the batch's. A batch of fewer
            conversations has empty ones, which cost next to nothing.
        pad_id: fills up shorter conversations; no result depends on it.
    """

    def __init__(self, rows: Conversations, size: int, seed: int = 0, parts: int = 1, pad_id: int = 0):
        self.rows = rows
        self.size = min(size, len(rows))
        self.seed = seed
        self.parts = parts
        self.pad_id = pad_id
        self.per_epoch = -(-len(rows) // self.size)
        self._widths = padded_widths(rows._limit - 1)
        self._epoch = -1
        self._batches: list[np.ndarray] = []

    def epoch(self, number: int) -> list[np.ndarray]:
        """Return the batches of an epoch, each as row numbers, shortest row first."""
        if number != self._epoch:
            rng = np.random.default_rng([self.seed, number])
            order = rng.permutation(len(self.rows))
            batches = []
            for first in range(0, len(order), POOL * self.size):
                pool = order[first : first + POOL * self.size]
                pool = pool[np.argsort(self.rows.lengths[pool], kind="stable")]
                batches += [pool[i : i + self.size] for i in range(0, len(pool), self.size)]
            self._epoch = number
            self._batches = [batches[i] for i in rng.permutation(len(batches))]
        return self._batches

    def numbers(self, k: int) -> np.ndarray:
        """Return the row numbers of batch k, counted from 0."""
        return self.epoch(k // self.per_epoch)[k % self.per_epoch]

    def longest(self) -> np.ndarray:
        """Return the row numbers of the largest possible batch."""
        return np.argsort(self.rows.lengths, kind="stable")[-self.size :]

    def widths(self, numbers: np.ndarray) -> np.ndarray:
        """Return the positions that each of these rows takes, padding included, (N,)."""
        return np.array([self._width(numbers[i : i + 1]) for i in range(len(numbers))])

    def counts(self, numbers: np.ndarray) -> Counts:
        """Count the tokens of a batch of these rows."""
        padded = sum(len(part) * self._width(part) for part in self._split(numbers))
        trained = sum(int(self.rows.trained[i][1:].sum()) for i in numbers)
        return Counts(int(self.rows.lengths[numbers].sum()), trained, padded)

    def make(self, numbers: np.ndarray) -> list[Part]:
        """Return the parts of a batch of these rows."""
        share = self.counts(numbers).trained / self.parts
        empty = self.parts - min(self.parts, len(numbers))
        parts = [self._part(part, share) for part in self._split(numbers)]
        nothing = Part(mx.zeros((1, 2), mx.int32), mx.zeros((1, 1), mx.bool_), mx.array(1.0))
        return parts + [nothing] * empty

    def _split(self, numbers: np.ndarray) -> list[np.ndarray]:
        return np.array_split(numbers, min(self.parts, len(numbers)))

    def _width(self, numbers: np.ndarray) -> int:
        """Return the number L of positions that predict a token, padding included."""
        longest = int(self.rows.lengths[numbers].max()) - 1
        return self._widths[bisect_left(self._widths, longest)]

    def _part(self, numbers: np.ndarray, share: float) -> Part:
        width = self._width(numbers)
        ids = np.full((len(numbers), width + 1), self.pad_id, np.int32)
        counted = np.zeros((len(numbers), width), bool)
        for row, i in enumerate(numbers):
            length = self.rows.lengths[i]
            ids[row, :length], counted[row, : length - 1] = self.rows.ids[i], self.rows.trained[i][1:]
        return Part(mx.array(ids), mx.array(counted), mx.array(share, mx.float32))
