"""Turn a query and its documents into token sequences, in the format of each kind of reranker.

    sequences = tokenizer([("query", ["document", "document"])])
    sequences.texts                  the sequences, for the backbone
    sequences.text, sequences.place  of each document: its sequence, and the position of its score in it

Formats: Qwen3-Reranker (Zhang et al. 2025, arXiv 2506.05176), cross-encoders (Nogueira and Cho 2019, arXiv
1901.04085), jina-reranker-v3 (Wang et al. 2025, arXiv 2509.25085). Users' texts never become special tokens.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_retrieval.backbones.hub import read_config
from mlx_retrieval.models.batching import Texts
from mlx_retrieval.models.tokenizer import TextTokenizer, returns_types
from mlx_retrieval.utils.errors import SettingError, UserError
from mlx_retrieval.utils.text import writable

Group = tuple[str, Sequence[str]]  # a query and its documents

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

PASSAGE_END, QUERY_END = "<|embed_token|>", "<|rerank_token|>"
LIST_SYSTEM = (
    "system\nYou are a search relevance expert who can determine a ranking of the passages based on how relevant they "
    "are to the query. If the query is a question, how relevant a passage is depends on how well it answers the "
    "question. If not, try to analyze the intent of the query and assess how well each passage satisfies the intent. "
    "If an instruction is provided, you should follow the instruction when determining the ranking."
)
LIST_USER = (
    "user\nI will provide you with {count} passages, each indicated by a numerical identifier. Rank the passages based "
    "on their relevance to query: {query}\n{instruct}"
)
PASSAGES = 64  # documents in one sequence of a listwise reranker


class Sequences(NamedTuple):
    """N token sequences, and the positions in them at which the D documents of all groups are scored, in order."""

    texts: Texts
    text: np.ndarray  # (D,) int32: the sequence of each document
    place: np.ndarray  # (D,) int32: the position of its score in the sequence's representation
    cut: int  # documents that were truncated
    cut_queries: int = 0  # queries that were truncated, beside one of their documents at least


class Part(NamedTuple):
    """The query or the document of a pair as the model sees it, and its tokens; `full`: before truncation."""

    text: str
    length: int
    full: int


def body(instruction: str, query: str, document: str) -> str:
    """Return the part of Qwen3-Reranker's prompt between PREFIX and SUFFIX."""
    return f"{beginning(instruction, query)}\n<Document>: {document}"


def beginning(instruction: str, query: str) -> str:
    """Return the part of Qwen3-Reranker's prompt between PREFIX and the document."""
    return f"<Instruct>: {instruction}\n<Query>: {query}"


def _texts(sequences: Sequence[list[int]], second: Sequence[int] | None = None) -> Texts:
    lengths = np.array([len(ids) for ids in sequences], np.int32)
    flat = np.array([token for ids in sequences for token in ids], np.int32)
    pairs = None if second is None else np.array(second, np.int32)
    return Texts(flat, lengths, np.zeros_like(lengths), lengths.copy(), None, pairs)


class PairTokenizer(ABC):
    """Base class: the tokenizer of the model in `folder`, and the most tokens of a sequence, `max_length`."""

    def __init__(self, folder: Path, max_length: int):
        self.texts = TextTokenizer(folder, {}, {"text": max_length}, pool_special=True)
        self.tokenizer, self.pad_id, self.max_length = self.texts.tokenizer, self.texts.pad_id, max_length

    @abstractmethod
    def __call__(self, groups: Sequence[Group]) -> Sequences:
        """Return the token sequences of queries and their documents."""

    @abstractmethod
    def parts(self, query: str, document: str) -> tuple[Part, Part]:
        """Return the query and the document of a pair as the model sees them, without what all pairs have."""

    def _part(self, ids: list[int], full: int) -> Part:
        return Part(self.tokenizer.decode(ids, skip_special_tokens=False).strip("\n"), len(ids), full)

    def _room(self, frame: int) -> int:
        if (room := self.max_length - frame) < 2:
            raise SettingError(
                "{max_length} {limit} leaves no room: the prompt alone takes {frame} tokens",
                limit=self.max_length,
                frame=frame,
            )
        return room


class YesNoTokenizer(PairTokenizer):
    """Qwen3-Reranker's prompt. Only the body is truncated, at the end of the document; the suffix is always kept."""

    def __init__(self, folder: Path, max_length: int, instruction: str = INSTRUCTION):
        super().__init__(folder, max_length)
        self.instruction = instruction
        plain = self.texts.tokenizer.encode
        self.prefix = [*self.texts.opening, *plain(PREFIX, add_special_tokens=False).ids]
        self.suffix = plain(SUFFIX, add_special_tokens=False).ids
        self.answers = [self._answer("no"), self._answer("yes")]
        if self.answers[0] == self.answers[1]:
            raise UserError(
                f"{folder}: the tokenizer begins yes and no with the same token, so it cannot tell them apart"
            )
        self.room = self._room(len(self.prefix) + len(self.suffix))

    def _answer(self, word: str) -> int:
        """Return the token of an answer, or its first token if the vocabulary has no single one."""
        token = self.tokenizer.token_to_id(word)
        return self.tokenizer.encode(word, add_special_tokens=False).ids[0] if token is None else token

    def __call__(self, groups: Sequence[Group]) -> Sequences:
        pairs = [body(self.instruction, query, document) for query, documents in groups for document in documents]
        bodies = list(self.texts.bodies(pairs, room=self.room))
        cut = sum(len(ids) > self.room for ids in bodies)
        queries = [beginning(self.instruction, query) for query, documents in groups if documents] if cut else []
        cut_queries = sum(len(ids) > self.room for ids in self.texts.bodies(queries, room=self.room))
        count = np.arange(len(bodies), dtype=np.int32)
        sequences = [[*self.prefix, *ids[: self.room], *self.suffix] for ids in bodies]
        return Sequences(_texts(sequences), count, np.zeros_like(count), cut, cut_queries)

    def parts(self, query: str, document: str) -> tuple[Part, Part]:
        whole = body(self.instruction, query, document)
        beginnings = [f"<Instruct>: {self.instruction}", beginning(self.instruction, query)]
        *heads, ids = self.texts.bodies([*beginnings, whole])
        first, second = map(len, heads)  # a line break is no token of its own where it follows a full stop
        kept = ids[: self.room]
        return self._part(kept[first:second], second - first), self._part(kept[second:], len(ids) - second)


class CrossEncoderTokenizer(PairTokenizer):
    """Query and document, framed as the tokenizer frames a pair: `[CLS] q [SEP] d [SEP]`, `<s> q </s></s> d </s>`.

    Long pairs are truncated as by transformers' `longest_first`: the longer text, mostly the document, at its end.
    """

    def __init__(self, folder: Path, max_length: int):
        super().__init__(folder, max_length)
        self.frame, self.has_types = self._frame()
        # Without a table of token types, the model has none, whatever its tokenizer says. And without types from the
        # tokenizer, transformers' model takes the whole pair for the first text's.
        self.has_types &= read_config(folder).get("type_vocab_size", 0) > 1 and returns_types(folder)
        self.room = self._room(sum(map(len, self.frame)))

    def _frame(self) -> tuple[list[list[int]], bool]:
        """Return the tokens before, between and after two texts, and whether the second has a token type of its own."""
        pair = self.tokenizer.encode("a", "a")
        sequence = pair.sequence_ids
        first, second = ([i for i, n in enumerate(sequence) if n == number] for number in (0, 1))
        ids = pair.ids
        frame = [ids[: first[0]], ids[first[-1] + 1 : second[0]], ids[second[-1] + 1 :]]
        return frame, pair.type_ids[second[0]] == 1

    def _lengths(self, query: int, document: int) -> tuple[int, int]:
        """Return how many tokens of each are kept."""
        short, long = sorted((query, document))
        long = max(short, self.room - short)
        if short + long > self.room:
            short, long = self.room // 2, self.room - self.room // 2
        return (short, long) if query <= document else (long, short)

    def __call__(self, groups: Sequence[Group]) -> Sequences:
        queries = list(self.texts.bodies([query for query, _ in groups]))
        documents = iter(self.texts.bodies([document for _, group in groups for document in group]))
        before, between, after = self.frame
        sequences, second, cut, cut_queries = [], [], 0, 0
        for query, (_, group) in zip(queries, groups, strict=True):
            fewest = len(query)
            for _ in group:
                document = next(documents)
                q, d = self._lengths(len(query), len(document))
                cut += d < len(document)
                fewest = min(fewest, q)
                head = [*before, *query[:q], *between]
                second.append(len(head))
                sequences.append([*head, *document[:d], *after])
            cut_queries += fewest < len(query)
        count, types = np.arange(len(sequences), dtype=np.int32), second if self.has_types else None
        return Sequences(_texts(sequences, types), count, np.zeros_like(count), cut, cut_queries)

    def parts(self, query: str, document: str) -> tuple[Part, Part]:
        first, second = self.texts.bodies([query, document])
        before, between, after = self.frame
        q, d = self._lengths(len(first), len(second))
        frame = len(before) + len(between)
        return (
            self._part([*before, *first[:q], *between], frame + len(first)),
            self._part([*second[:d], *after], len(second) + len(after)),
        )


class ListTokenizer(PairTokenizer):
    """jina-reranker-v3's prompt: up to PASSAGES documents of one query in a sequence, the rest in further sequences.

    Args:
        max_length: most tokens of a document.
        query_max_length: most tokens of a query.
        most: most tokens of a sequence.
    """

    def __init__(self, folder: Path, max_length: int, query_max_length: int, most: int, instruction: str = ""):
        super().__init__(folder, max_length)
        self.query_max_length, self.most, self.instruction = query_max_length, most, instruction
        self.marks = [self.tokenizer.token_to_id(mark) for mark in (PASSAGE_END, QUERY_END)]
        if None in self.marks:
            raise UserError(
                f"{folder}: the tokenizer lacks {PASSAGE_END} or {QUERY_END}, so this is no listwise reranker"
            )

    def _truncated(self, texts: Sequence[str], limit: int) -> tuple[list[str], int]:
        """Return the texts without the marks, at most `limit` tokens each, and the number of those truncated."""
        texts = [writable(text).replace(PASSAGE_END, "").replace(QUERY_END, "") for text in texts]
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        long = [len(e) > limit for e in encoded]
        ends = [e.offsets[limit - 1][1] if is_long else None for e, is_long in zip(encoded, long, strict=True)]
        return [text[:end] for text, end in zip(texts, ends, strict=True)], sum(long)

    def _block(self, query: str, pieces: list[list[int]], count: int) -> list[int]:
        """Return the sequence of `count` passages; `pieces` are the ids from one passage's end to the next one's."""
        plain, passage_end, query_end = self._plain, *self.marks
        instruct = f"<instruct>\n{self.instruction}\n</instruct>\n" if self.instruction else ""
        (head,) = self.texts.bodies([LIST_USER.format(count=count, query=query, instruct=instruct) + pieces[0]])
        ids = [*plain("<|im_start|>" + LIST_SYSTEM + "<|im_end|>\n<|im_start|>"), *head, passage_end]
        for piece in pieces[1:]:
            ids += [*piece, passage_end]
        (tail,) = self.texts.bodies([f"\n</passage>\n<query>\n{query}"])
        closing = plain("\n</query><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
        return [*ids, *tail, query_end, *closing]

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def __call__(self, groups: Sequence[Group]) -> Sequences:
        queries, cut_queries = self._truncated([query for query, _ in groups], self.query_max_length)
        sequences: list[list[int]] = []
        text, place, cut = [], [], 0
        for query, (_, group) in zip(queries, groups, strict=True):
            documents, truncated = self._truncated(group, self.max_length)
            cut += truncated
            for block in self._blocks(query, documents):
                ids = np.array(block, np.int32)
                ends = np.flatnonzero(ids == self.marks[0])
                text += [len(sequences)] * len(ends)
                place += ends.tolist()
                sequences.append(block)
        text, place = np.array(text, np.int32), np.array(place, np.int32)
        return Sequences(_texts(sequences), text, place, cut, cut_queries)

    def parts(self, query: str, document: str) -> tuple[Part, Part]:
        parts = []
        for text, limit in ((query, self.query_max_length), (document, self.max_length)):
            (kept,), _ = self._truncated([text], limit)
            (full,), _ = self._truncated([text], sys.maxsize)
            parts.append(Part(kept, len(self._plain(kept)), len(self._plain(full))))
        return parts[0], parts[1]

    def _blocks(self, query: str, documents: list[str]) -> list[list[int]]:
        """Return the sequences of one query, as many documents in each as fit."""
        blocks, first = [], 0
        lengths = [len(ids) + 16 for ids in self.texts.bodies(documents)]  # 16: the tags around each
        while first < len(documents):
            room, last = self.most - 2 * self.query_max_length - 256, first
            while last < len(documents) and last - first < PASSAGES and (last == first or room >= lengths[last]):
                room -= lengths[last]
                last += 1
            marked = [f'<passage id="{i}">\n{text}' for i, text in enumerate(documents[first:last])]
            pieces = [marked[0], *self.texts.bodies([f"\n</passage>\n{text}" for text in marked[1:]])]
            blocks.append(self._block(query, pieces, last - first))
            first = last
        return blocks
