"""Types that the search indices share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mlx_retrieval.dataset.chunks import MAX_CHARACTERS, OVERLAP
from mlx_retrieval.retrieval.analyzer import ENGLISH
from mlx_retrieval.retrieval.fields import WEIGHTS

RANKS = 1_000  # documents ranked for each query; as many as mteb asks for
FILE, LOCK, VERSION = "index.json", ".lock", 3

TOKEN_BITS = 4  # see residual_codes.py


@dataclass
class IndexInfo:
    """The source, model and settings of an index: index.json. Other settings would need other vectors."""

    root: str  # the indexed folder: absolute, or relative to the index if the index is inside it
    is_corpus: bool  # a BEIR corpus: paths are document ids
    model: str
    fingerprint: str
    dimensions: int
    max_characters: int  # of a chunk
    overlap: int  # characters that the parts of a function or section share, if it was too long for one chunk
    maxsim: str = ""  # late interaction: reduction over a query's tokens, mean or sum; "" = one vector a chunk
    impute: int = 0  # late interaction: see maxsim.maxsim
    token_bits: int = TOKEN_BITS  # late interaction: of a dimension of a stored token vector
    token_pooling: int = 1  # late interaction: tokens of a chunk that become one vector, on average
    complete: bool = False  # False while indexing runs, or if it was interrupted
    partitioned: int = 0  # number of chunks when the vectors were last partitioned; 0 = not yet
    folders: list[str] = field(default_factory=list)  # the indexed folders, relative to `root`; [] = `root` itself
    language: str = ENGLISH  # of stems and stop words; see analyzer.py
    fields: dict[str, int] = field(default_factory=WEIGHTS.copy)  # weights in a search by words; see fields.py
    weight: float | None = None  # of the meaning in a search by both, as learnt; None = fusion.WEIGHTS
    documents: bool = False  # read as adapt.py reads documents: see document_tree.py
    exclude: list[str] = field(default_factory=list)  # patterns of files that were left out, besides .gitignore's
    max_file_size: int | None = None  # in bytes, of the last run; None = index_sources.MAX_FILE_SIZE
    analysis: int = 1  # version of analyzer.ANALYSIS that made the words
    version: int = VERSION

    def __post_init__(self) -> None:
        """Forget settings without effect, which earlier versions took and then compared."""
        if not self.maxsim:
            self.token_bits, self.token_pooling = TOKEN_BITS, 1
        if self.is_corpus and not self.documents:
            self.max_characters, self.overlap, self.exclude, self.max_file_size = MAX_CHARACTERS, OVERLAP, [], None


class FileRecord(NamedTuple):
    """A file as it was when it was read; `left_out` says why it has no chunks."""

    path: str
    size: int
    stamp: int  # modification time in nanoseconds; for a document, a hash of its text
    sha256: str
    chunks: int
    left_out: str


class Within(NamedTuple):
    """The chunks that a search looks at: all that meet each of these conditions."""

    ids: tuple[str, ...] | None = None  # of the chunks; None = any
    languages: tuple[str, ...] = ()  # one of these; () = any
    paths: tuple[str, ...] = ()  # files or folders, * and ? stand for any characters; () = any
    rows: tuple[int, ...] = ()  # of the chunks in `ids`, as hits name them: they are found faster; () = not known


EVERYWHERE = Within()


@dataclass(frozen=True)
class Hit:
    """A chunk that a search returns. `score` depends on the mode: BM25, cosine, or both fused."""

    id: str
    path: str
    line: int
    end_line: int
    language: str
    kind: str
    name: str
    text: str
    score: float
    row: int | None = field(default=None, compare=False, repr=False)  # where the index keeps it, if it says so


def among(hits: Sequence[Hit]) -> Within:
    """Return a condition that exactly these chunks meet."""
    rows = tuple(hit.row for hit in hits if hit.row is not None)
    return Within(ids=tuple(hit.id for hit in hits), rows=rows if len(rows) == len(hits) else ())


def sort_hits(hits: Iterable[Hit]) -> list[Hit]:
    """Return hits best first; equal scores in the order of path, line and id, so that results are reproducible."""
    return sorted(hits, key=lambda hit: (-hit.score, hit.path, hit.line, hit.id))
