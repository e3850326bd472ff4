"""The command `mine.py negatives`: its flags, what it opens, and what it tells.

python mine.py negatives --data pairs.jsonl --corpus corpus.jsonl --model M --output mined.jsonl
python mine.py negatives --data pairs.jsonl --by both --model M --reranker R --scores --output mined.jsonl
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from mlx_retrieval.dataset.elastic import fields
from mlx_retrieval.dataset.elastic.server import is_address
from mlx_retrieval.dataset.rows import find_files
from mlx_retrieval.mining import collection, hard_negatives, teacher
from mlx_retrieval.mining import output as mining_output
from mlx_retrieval.mining.cache import add_files, print_scores, resumable, tell_begun, work_folder
from mlx_retrieval.mining.elastic_corpus import ElasticCorpus
from mlx_retrieval.utils.console import print_lines, print_rows
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.progress import progress_bar

RELATIVE_MARGIN = 0.05  # NV-Retriever's best


@resumable()
def run(args: argparse.Namespace) -> None:
    """Write the rows of `args.data` with hard negatives to `args.output`, and print what was found."""
    from mlx_retrieval.inference import embedder
    from mlx_retrieval.retrieval import bm25

    output = Path(args.output).expanduser()
    mining_output.check_output(output, args.overwrite)
    by = args.by or ("model" if args.model else "bm25")
    if by != "bm25" and not args.model:
        raise UserError(f"--by {by}: needs --model")
    margin = args.relative_margin
    if margin == "default":
        margin = RELATIVE_MARGIN if args.model or args.reranker else None
    rules = hard_negatives.Rules(
        by, args.skip, args.take, args.range_max, args.absolute_margin, margin, args.max_score, args.min_score,
        args.sampling, args.seed,
    )  # fmt: skip
    files, skipped = find_files(args.data), [] if args.skip_bad_rows else None
    corpus = open_corpus(args)
    if isinstance(corpus, ElasticCorpus) and not (args.model or args.reranker) and (margin or args.absolute_margin):
        raise UserError(
            "margins compare with the score of the positive, which Elasticsearch does not tell: add --model"
        )
    model = embedder.load(args.model, max_length=args.max_length) if args.model else None
    if model and model.late:
        raise UserError(
            f"--model {args.model}: a late-interaction model, whose token vectors of a corpus are not kept on disk; "
            "let it judge: --reranker with --by bm25, or with another --model"
        )
    judge = teacher.Teacher(args.reranker, "reranker", reranker_type=args.reranker_type) if args.reranker else None
    with work_folder(output, args.work) as work:
        found = collection.collect(collection.read_rows(files, collection.MINED, skipped), corpus, work.folder)
        marks = found.marks | vars(rules) | {"model": model.fingerprint() if model else ""}
        marks["reranker"] = judge.mark if judge else ""
        tell_begun(work, *work.begin(marks, ("corpus", "model")), skipped)
        sources = hard_negatives.Sources(judge=judge and judge.score_groups)
        if model:

            def vectors_of(prompt: str):
                return lambda texts: embedder.embed(model, texts, prompt)

            with progress_bar("embedding", "documents") as progress:
                vectors = work.vectors(found.documents, model.dimensions, vectors_of("document"), progress)
            sources = sources._replace(encode=vectors_of("query"), vectors=vectors)
        if by != "model" and isinstance(corpus, ElasticCorpus):
            sources = sources._replace(words=corpus.words(found.corpus, len(found.documents), rules.depth))
        elif by != "model":
            sources = sources._replace(words=bm25.bm25_scores(found.documents.read(range(len(found.documents)))))
        with progress_bar("searching", "queries") as progress:
            mined = hard_negatives.mine(found, sources, rules, work, progress)
        scored_by = judge.model.name if judge else model.name if model else "BM25"
        print_mined(found, mined, rules, scored_by)
        if not (mined.numbers >= 0).any():
            raise UserError("no negative was found: the corpus is small, or the filters are narrow")
        if judge and judge.cut:
            print(f"mine.py: the reranker cut {judge.cut:,} documents at their end", file=sys.stderr)
        rows = collection.read_rows(files, collection.MINED, [] if args.skip_bad_rows else None)
        count = mining_output.write_rows(output, mining_output.mined_rows(rows, found, mined, args.scores))
    told = [("written", f"{output} ({count:,} rows)"), ("next", f"python train.py --data {output} --output adapters/m")]
    print_lines(told)


def open_corpus(args: argparse.Namespace) -> Iterable[str]:
    """The documents that `--corpus` names; none where it is not given."""
    if not args.corpus:
        return ()
    if not is_address(args.corpus):
        return collection.read_corpus(collection.corpus_file(args.corpus), args.field)
    texts = fields.parse(args.es_fields).get("document")
    if not texts:
        raise UserError("--es-fields: document=FIELD+FIELD names what is read")
    return ElasticCorpus(args.corpus, texts)


def print_mined(
    found: collection.Collection, mined: hard_negatives.Mined, rules: hard_negatives.Rules, name: str
) -> None:
    """What was read, two tables (scores, and what was left out), and how many negatives there are."""
    rows, distinct = len(found.row_query), len(found.documents)
    lines = [
        ("rows", f"{rows:,}, {len(found.queries):,} distinct queries"),
        ("documents", f"{distinct:,} distinct of {found.read:,}; equal but for case and white space are one"),
    ]
    print_lines(lines)
    taken = mined.numbers[found.row_query] >= 0
    print_scores(name, mined.known[found.row_pairs], mined.scores[found.row_query][taken])
    _, candidates, *counts = mined.counts.tolist()
    looked = candidates + counts[0]
    out = zip(hard_negatives.REASONS.items(), counts, strict=True)
    table = [[f"{reason}: {text}", f"{n:,}", f"{n / looked:.1%}"] for (reason, text), n in out if n]
    if table:
        print_rows(f"Left out of the best {rules.depth} documents of each query", ("reason", "count", "share"), table)
    short = taken.sum(axis=1)
    few, none = int((short < rules.take).sum()), int((short == 0).sum())
    fewer = f"; {few:,} rows have fewer than {rules.take}, {none:,} of them none"
    print_lines([("negatives", f"{taken.sum():,}" + fewer * bool(few))])
    if few:
        print_lines([("for more", "--range-max N looks at more documents, --relative-margin off filters less")])


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `mine.py negatives`."""
    out = commands.add_parser(
        "negatives",
        help="hard negatives for rows of queries and positives",
        description="Write the rows with negatives: documents that are found for a query and are no known positive of "
        "it. Documents are those of --corpus and of the rows; negatives that rows have are documents like any other. "
        "The best --range-max of a query pass the filters, --skip leaves out the first of the rest, --take takes of "
        "what follows. Filters have the names and meanings of sentence-transformers' mine_hard_negatives; they compare "
        "the reranker's scores, else the model's, else BM25's. Rows of one query get the same negatives.",
    )
    add_files(out, "rows with a query and a positive; their formats are train.py's")
    corpus = "JSON lines or .txt, a BEIR folder, or es://INDEX, which then finds by words (default: only the rows')"
    out.add_argument("--corpus", metavar="FILE", help=corpus)
    made_of = "with es://: document=FIELD+FIELD says what is read (default: title+snippet)"
    out.add_argument("--es-fields", default=fields.DEFAULT, metavar="TEXT", help=made_of)
    out.add_argument("--field", metavar="KEY", help="key of the text in --corpus (default: title and text, ...)")
    out.add_argument("--model", help="embedding model: adapter folder, base model's folder, or hub name")
    out.add_argument("--max-length", type=int, metavar="N", help="cut documents after N tokens (default: as saved)")
    by = "what finds documents; both: reciprocal rank fusion (default: model, or bm25 without --model)"
    out.add_argument("--by", choices=hard_negatives.BY, help=by)
    out.add_argument("--reranker", metavar="MODEL", help="its scores decide order and filters; late models, too")
    out.add_argument("--reranker-type", metavar="KIND", help="where the reranker's files do not tell its kind")
    rules = hard_negatives.Rules()
    skip = "leave out the first K that passed the filters (default: %(default)s)"
    out.add_argument("--skip", "--range-min", type=int, default=rules.skip, metavar="K", help=skip)
    take = "negatives of a query (default: %(default)s)"
    out.add_argument("--take", "--num-negatives", type=int, default=rules.take, metavar="N", help=take)
    depth = "documents of a query that are looked at (default: skip + 10 * take)"
    out.add_argument("--range-max", type=int, metavar="N", help=depth)
    sampling = "the first --take, or any of them (default: %(default)s)"
    out.add_argument("--sampling", "--sampling-strategy", choices=hard_negatives.SAMPLING, default="top", help=sampling)
    out.add_argument("--seed", type=int, default=0, metavar="N", help="of --sampling random (default: %(default)s)")
    absolute = "drop what scores above the query's lowest positive less X (default: off)"
    out.add_argument("--absolute-margin", type=_margin, metavar="X", help=absolute)
    relative = f"drop what scores above that positive less X times its size (default: {RELATIVE_MARGIN}; BM25: off)"
    out.add_argument("--relative-margin", type=_margin, default="default", metavar="X", help=relative)
    out.add_argument("--max-score", type=float, metavar="X", help="drop what scores above X")
    out.add_argument("--min-score", type=float, metavar="X", help="drop what scores below X")
    out.add_argument("--scores", action="store_true", help="write scores of positive and negatives, for distillation")
    out.set_defaults(run=run)


def _margin(text: str) -> float | str | None:
    """A number; None for "off"."""
    return None if text == "off" else text if text == "default" else float(text)
