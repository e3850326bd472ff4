"""Mine hard negatives for files of rows, or score them with a teacher: read, open models, fill the cache.

from mlx_retrieval.mining import hard_negatives, run
from mlx_retrieval.mining.cache import cache_folder
with cache_folder(Path("mined.jsonl"), None) as cache:
    found = run.mine_negatives(files, corpus, hard_negatives.Rules(by="bm25"), cache)
    found.write(Path("mined.jsonl"), with_scores=False)
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_retrieval.dataset.columns import ELASTIC_DEFAULT, Columns
from mlx_retrieval.dataset.columns import parse as parse_columns
from mlx_retrieval.dataset.elastic.server import is_address
from mlx_retrieval.dataset.row_formats import ignored_keys
from mlx_retrieval.inference import embedder
from mlx_retrieval.inference.finite import NonFiniteError
from mlx_retrieval.mining import collection, hard_negatives, output, row_vectors, teacher
from mlx_retrieval.mining.cache import ResumableCache
from mlx_retrieval.mining.elastic_corpus import ElasticCorpus
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.progress import progress_bar
from mlx_retrieval.utils.text import quantity

Notify = Callable[[str], None]


def open_corpus(name: str | None, field: str | None = None, es_fields: str = ELASTIC_DEFAULT) -> Iterable[str]:
    """Return the documents of a file, of a BEIR folder or of es://INDEX; none if `name` is None. UserError."""
    if not name:
        return ()
    if not is_address(name):
        return collection.read_corpus(collection.corpus_file(name), field)
    if not (texts := parse_columns(es_fields, "--es-fields").get("document")):
        raise UserError("--es-fields: document=FIELD+FIELD must name the fields of a document")
    return ElasticCorpus(name, texts)


def load_retriever(
    name: str, max_length: int | None = None, dtype: str | None = None, role: str = "--model"
) -> embedder.Model:
    """Load the model that finds documents, or the teacher of vectors, which has one vector a text, else UserError.

    `role`: the flag that names the model.
    """
    model = embedder.load(name, dtype=dtype, max_length=max_length)
    if model.late and role != "--model":
        raise UserError(f"{role} {name}: a late-interaction model has a vector a token, and not one a text")
    return model


def check_margins(corpus: Iterable[str], rules: hard_negatives.Rules, has_model: bool) -> None:
    """UserError if the rules need scores of positives, and only Elasticsearch finds documents."""
    margins = [margin for margin in (rules.relative_margin, rules.absolute_margin) if margin is not None]
    if isinstance(corpus, ElasticCorpus) and not has_model and margins:
        raise UserError(
            "margins compare with the score of the positive, which Elasticsearch does not return: add --model"
        )


@dataclass
class Negatives:
    """The texts that were read, and the negatives that were mined for them."""

    files: Sequence[Path | str]
    texts: collection.Collection
    mined: hard_negatives.Mined
    scored_by: str  # name of the model whose scores these are, or BM25
    skip_bad: bool
    ignore_keys: Sequence[str] = ()
    columns: Columns | None = None

    def write(self, path: Path, with_scores: bool) -> int:
        """Write the rows with their negatives and return their number. UserError if the files have changed."""
        skipped = [] if self.skip_bad else None
        rows = collection.read_rows(self.files, collection.MINED, skipped, None, self.ignore_keys, self.columns)
        return output.write_rows(path, output.mined_rows(rows, self.texts, self.mined, with_scores))


def mine_negatives(
    files: Sequence[Path | str],
    corpus: Iterable[str],
    rules: hard_negatives.Rules,
    cache: ResumableCache,
    model: embedder.Model | None = None,
    judge: teacher.Teacher | None = None,
    skip_bad: bool = False,
    notify: Notify = print,
    ignore_keys: Sequence[str] = (),
    columns: Columns | None = None,
) -> Negatives:
    """Mine negatives for the rows of `files`, from the documents of `corpus` and of the rows themselves.

    Args:
        model: finds documents by their vectors; needed unless `rules.by` is bm25.
        judge: its scores decide order and filters, instead of the retriever's.
        skip_bad: leave out rows that cannot be used.
        notify: takes messages about rows left out and about finished work in the cache.
        ignore_keys: keys of rows that are treated as absent, and left out of the rows that are written.
        columns: the columns that rows are made of, see dataset/columns.py.
    """
    from mlx_retrieval.retrieval import bm25

    skipped, ignored = [] if skip_bad else None, Counter()
    rows = collection.read_rows(files, collection.MINED, skipped, ignored, ignore_keys, columns)
    texts = collection.collect(rows, corpus, cache.folder)
    if ignored:
        notify(ignored_keys(ignored))
    fingerprints = texts.fingerprints | vars(rules)
    fingerprints |= {"model": _identity(model), "reranker": judge.fingerprint if judge else ""}
    open_cache(cache, fingerprints, ("corpus", "model"), skipped, notify)
    retrievers = hard_negatives.Retrievers(judge=judge and judge.score_groups)
    if model:
        with progress_bar("embedding", "documents") as progress:
            encode = _encoder(model, "document")
            if model.late:
                store = cache.tokens(texts.documents, encode, progress)
                index, _ = store.open(model.config.maxsim, model.config.impute)
                retrievers = retrievers._replace(tokens=index)
            else:
                vectors = cache.vectors(texts.documents, model.dimensions, encode, progress)
                retrievers = retrievers._replace(vectors=vectors)
        retrievers = retrievers._replace(encode=_encoder(model, "query"))
    if rules.by != "model" and isinstance(corpus, ElasticCorpus):
        retrievers = retrievers._replace(words=corpus.words(texts.corpus, len(texts.documents), rules.depth))
    elif rules.by != "model":
        documents = texts.documents.read(range(len(texts.documents)))
        retrievers = retrievers._replace(words=bm25.bm25_scorer(documents, rules.language))
    with progress_bar("searching", "queries") as progress:
        mined = hard_negatives.mine(texts, retrievers, rules, cache, progress)
    scored_by = judge.model.name if judge else model.name if model else "BM25"
    return Negatives(files, texts, mined, scored_by, skip_bad, ignore_keys, columns)


@contextmanager
def naming_lines(
    files: Sequence[Path | str],
    corpus: str | None = None,
    field: str | None = None,
    ignore_keys: Sequence[str] = (),
    columns: Columns | None = None,
) -> Iterator[None]:
    """Name in a NonFiniteError of this block the file and line of the text; of documents of es://, nothing."""
    try:
        yield
    except NonFiniteError as error:
        file = None if not corpus or is_address(corpus) else collection.corpus_file(corpus)
        if place := collection.place_of(error.texts[error.numbers[0]], files, file, field, ignore_keys, columns):
            raise error.placed(lambda _: str(place)) from error
        raise


def _identity(model: embedder.Model | None) -> str:
    """Return all that decides the vectors in the cache: the model's fingerprint, and its dtype; "" without a model."""
    return f"{model.fingerprint()} {model.dtype}" if model else ""


def _encoder(model: embedder.Model, prompt: str):
    return lambda texts: embedder.embed(model, texts, prompt)


def count_rows(
    files: Sequence[Path | str],
    skip_bad: bool = False,
    notify: Notify = print,
    ignore_keys: Sequence[str] = (),
    columns: Columns | None = None,
) -> tuple[teacher.Counts, list[str] | None]:
    """Return the counts of rows and documents to score, and the bad rows. UserError if no row has negatives.

    `notify` takes a message about keys that are not read.
    """
    skipped, ignored = [] if skip_bad else None, Counter()
    counts = teacher.count(collection.read_rows(files, collection.SCORED, skipped, ignored, ignore_keys, columns))
    if ignored:
        notify(ignored_keys(ignored))
    if counts.documents == counts.rows:
        raise UserError("--data: no row has negatives, so there is nothing to compare (mine.py negatives finds some)")
    return counts, skipped


def write_vectors(
    files: Sequence[Path | str],
    path: Path,
    model: embedder.Model,
    cache: ResumableCache,
    skipped: list[str] | None = None,
    notify: Notify = print,
    ignore_keys: Sequence[str] = (),
    columns: Columns | None = None,
) -> row_vectors.Texts:
    """Write the vectors of all texts of rows to `path`, and return the texts.

    Args:
        skipped: takes the places of bad rows, which are left out; None = they raise UserError.
        notify: takes messages about rows left out and about finished work in the cache.
        ignore_keys, columns: as for `count_rows`.
    """
    rows = collection.read_rows(files, None, skipped, None, ignore_keys, columns)
    texts = row_vectors.Texts((example for _, example in rows), cache.folder)
    report_skipped(skipped, notify)
    with progress_bar("embedding", "texts") as progress:
        row_vectors.write_vectors(path, texts, model, cache, notify, progress)
    return texts


def score_rows(
    files: Sequence[Path | str],
    path: Path,
    judge: teacher.Teacher,
    counts: teacher.Counts,
    cache: ResumableCache,
    skipped: Sequence[str] | None = None,
    notify: Notify = print,
    ignore_keys: Sequence[str] = (),
    columns: Columns | None = None,
) -> int:
    """Write the rows of `files` with the judge's scores to `path`, and return their number.

    Args:
        counts, skipped: from `count_rows`; the scores of positives and negatives are added to `counts`.
        notify: takes messages about rows left out and about finished work in the cache.
        ignore_keys: as for `count_rows`: keys of rows that are treated as absent, and left out of the written ones.
        columns: as for `count_rows`: the columns that rows are made of.
    """

    def rows() -> Iterator[teacher.Row]:
        bad = None if skipped is None else []
        return collection.read_rows(files, collection.SCORED, bad, None, ignore_keys, columns)

    fingerprints = {"data": counts.digest, "teacher": judge.fingerprint, "teacher kind": judge.kind}
    open_cache(cache, fingerprints, (), skipped, notify)
    with progress_bar("scoring", "rows") as progress:
        scores = teacher.score(teacher.groups_of(rows()), counts.rows, judge, cache, progress)
        return output.write_rows(path, teacher.scored_rows(rows(), scores, counts))


def open_cache(
    cache: ResumableCache,
    fingerprints: dict,
    for_vectors: Sequence[str],
    skipped: Sequence[str] | None,
    notify: Notify,
) -> None:
    """Open the cache; report the rows that were left out, and whether an earlier run is continued."""
    resumed, changed = cache.open(fingerprints, for_vectors)
    report_skipped(skipped, notify)
    if resumed and changed:
        notify(f"{cache.folder}: started over, changed since the last run: {', '.join(changed)}")
    elif resumed:
        notify(f"{cache.folder}: continued, {cache.blocks:,} blocks are finished")


def report_skipped(skipped: Sequence[str] | None, notify: Notify) -> None:
    """Report the rows that were left out, if there are any."""
    if skipped:
        notify(f"{quantity(len(skipped), 'bad row')} left out, the first: {skipped[0]}")
