"""Mine training data: code pairs, hard negatives, teachers' scores and vectors.

python mine.py code src --output pairs.jsonl                           # (docstring, code) pairs of a source tree
python mine.py code a/src b/lib --output pairs.jsonl --languages python rust
python mine.py negatives --data pairs.jsonl --corpus corpus.jsonl --model M --output mined.jsonl      # hard negatives
python mine.py negatives --data pairs.jsonl --by both --model M --reranker R --scores --output mined.jsonl
python mine.py score --data mined.jsonl --teacher MODEL --output scored.jsonl     # a teacher's scores, for distillation
python mine.py score --vectors --data pairs.jsonl --teacher MODEL --output teacher.safetensors      # or its vectors
python train.py --data mined.jsonl

In Python: `code_pairs.pairs`, `mine_negatives`, `Teacher`.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mlx_retrieval.backend import device_errors

import numpy as np

from mlx_retrieval import backend
from mlx_retrieval.backbones import describe_dtype
from mlx_retrieval.dataset import columns
from mlx_retrieval.dataset.row_files import hub_validations
from mlx_retrieval.dataset.rows import find_files, find_validation
from mlx_retrieval.dataset.source_code.languages import BY_SUFFIX, LANGUAGES
from mlx_retrieval.inference import dtypes
from mlx_retrieval.inference.text_vectors import ENDING
from mlx_retrieval.mining import code_pairs, hard_negatives, run
from mlx_retrieval.mining.cache import cache_folder
from mlx_retrieval.mining.hard_negatives import RELATIVE_MARGIN
from mlx_retrieval.mining.run import mine_negatives
from mlx_retrieval.mining.teacher import KINDS, Teacher
from mlx_retrieval.models.rerankers import KINDS as RERANKERS
from mlx_retrieval.utils import files, imports
from mlx_retrieval.utils.command import DEQUANTIZE_HELP, DTYPE_HELP, Parser, command, user_path
from mlx_retrieval.utils.console import print_lines, print_rows
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.outputs import check_output
from mlx_retrieval.utils.progress import progress_bar
from mlx_retrieval.utils.text import quantity, shell, writable

__all__ = ["Teacher", "code_pairs", "mine_negatives"]


# --- shared -----------------------------------------------------------------------------------------------------------


def add_files(out: argparse.ArgumentParser, data: str) -> None:
    """Add the flags of the files to read and write, and of the cache."""
    flag = out.add_argument
    flag("--data", nargs="+", required=True, type=user_path, metavar="FILE", help=f"{data}; CSV, Parquet, folders, ... "
         "as for train.py")  # fmt: skip
    flag("--columns", type=columns.parse, metavar="TEXT", help="columns or keys that rows are made of: "
         "query=question,document=title+body (default: by their own names)")  # fmt: skip
    flag("--output", required=True, type=user_path, metavar="FILE", help="JSON lines for train.py")
    flag("--overwrite", action="store_true", help="replace --output if it exists")
    flag("--work", type=user_path, metavar="FOLDER", help="keep finished work here, for later runs as well "
         "(default: beside --output, until that is written)")  # fmt: skip
    flag("--skip-bad-rows", action="store_true", help="leave out rows that cannot be used, and count them")
    flag("--ignore-keys", nargs="+", default=(), metavar="KEY", help="treat these keys of rows as absent, also "
         "a label, a score or negatives; --output lacks them")  # fmt: skip


@contextmanager
def resumable() -> Iterator[None]:
    """Add a hint to Ctrl-C, in commands that can be continued."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("stopped; the same command continues") from stop


def notify(message: str) -> None:
    """Print a message on standard error."""
    print(f"mine.py: {message}", file=sys.stderr)


def print_scores(name: str, positives: Sequence[float], others: Sequence[float], other: str = "negatives") -> None:
    """Print a table of the distribution of scores."""
    groups = {"positives": np.asarray(positives), other: np.asarray(others)}
    rows = [
        [group, f"{len(s):,}", *(f"{x:.4f}" for x in (s.mean(), *np.percentile(s, (5, 50, 95))))]
        for group, s in groups.items()
        if len(s)
    ]
    print_rows(f"Scores of {name}", ("of", "count", "mean", "p5", "p50", "p95"), rows)


# --- code -------------------------------------------------------------------------------------------------------------


def run_code(args: argparse.Namespace) -> None:
    """Write the pairs of `args.paths` to `args.output`, all or none, and print the counts."""
    output = Path(args.output)
    # Of a folder, the source files are inputs: other files there may be an earlier run's.
    is_source = output.suffix in BY_SUFFIX
    check_output(output, args.overwrite, [path for path in args.paths if is_source or not Path(path).is_dir()])
    if not 0 < args.min_lines <= args.max_lines:
        raise UserError(f"--min-lines {args.min_lines} --max-lines {args.max_lines}: needs 0 < min <= max")
    rules = code_pairs.Rules(args.languages, args.min_lines, args.max_lines, args.include_tests, args.keep_duplicates)
    counts = code_pairs.Counts()
    with files.replacing(output, f"--output {output}") as temporary:
        with (
            open(temporary, "w", encoding="utf-8", newline="\n") as file,
            progress_bar("mining", "files") as progress,
        ):
            for pair in code_pairs.pairs(args.paths, rules, counts, progress):
                file.write(writable(json.dumps(pair._asdict(), ensure_ascii=False)) + "\n")
        print_counts(counts)
        if not counts.pairs:
            raise UserError(f"{' '.join(args.paths)}: no pair found in {quantity(counts.files.total(), 'source file')}")
    print_lines(
        [
            ("written", f"{output} ({quantity(counts.pairs.total(), 'pair')})"),
            ("next", shell("python", "train.py", "--data", output, "--output", "adapters/code")),
        ]
    )


def print_counts(counts: code_pairs.Counts) -> None:
    """Print two tables: the counts by language, and the reasons of everything that was left out."""
    columns = (counts.files, counts.definitions, counts.pairs)
    rows = [[name, *(f"{column[name]:,}" for column in columns)] for name in LANGUAGES if counts.files[name]]
    if len(rows) > 1:
        rows.append(["all", *(f"{column.total():,}" for column in columns)])
    print_rows("Mined", ("language", "files", "definitions", "pairs"), rows)
    rows = []
    for reasons, left_out, unit in (
        (code_pairs.FILE_REASONS, counts.left_out_files, "file"),
        (code_pairs.REASONS, counts.left_out, "definition"),
    ):
        for reason, meaning in reasons.items():
            if n := left_out[reason]:
                counted = "folder" if reason.startswith("folder") else unit
                rows.append([f"{reason}: {meaning}", quantity(n, counted)])
    if rows:
        print_rows("Left out", ("reason", "count"), rows)


def add_code(commands: argparse._SubParsersAction) -> None:
    reasons = [f"  {name}: {text}" for name, text in (code_pairs.FILE_REASONS | code_pairs.REASONS).items()]
    suffixes = {name: [s for s, language in BY_SUFFIX.items() if language.name == name] for name in LANGUAGES}
    out = commands.add_parser(
        "code",
        help="(docstring, function or class) pairs from source trees",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write (docstring, code) pairs of source trees as rows for train.py. The query is the docstring,\n"
        "or else the comment directly above, up to its first section (parameters, returns, examples, ...):\n"
        "at most 600 characters, unless the first paragraph is longer. The positive is the function or\n"
        "class without its docstring and without those of the functions and classes inside it.",
        epilog="left out are:\n"
        + "\n".join(reasons)
        + "\n\nlanguages:\n"
        + "\n".join(f"  {name}: {' '.join(endings)}" for name, endings in suffixes.items()),
    )
    out.add_argument(
        "paths", nargs="+", type=user_path, metavar="PATH", help="folders and files; the rules apply only below them"
    )
    out.add_argument(
        "--output",
        required=True,
        type=user_path,
        metavar="FILE",
        help="JSON lines: query, positive, path, line, name, ...",
    )
    out.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    out.add_argument(
        "--languages", nargs="+", choices=LANGUAGES, default=(), metavar="NAME", help="only these (default: all)"
    )
    out.add_argument(
        "--min-lines", type=int, default=2, metavar="N", help="least number of lines of code (default: %(default)s)"
    )
    out.add_argument(
        "--max-lines",
        type=int,
        default=150,
        metavar="N",
        help="greatest number of lines of code (default: %(default)s)",
    )
    out.add_argument("--include-tests", action="store_true", help="mine tests as well")
    out.add_argument(
        "--keep-duplicates", action="store_true", help="keep duplicates, near duplicates and repeated queries"
    )
    out.set_defaults(run=run_code)


# --- negatives --------------------------------------------------------------------------------------------------------


@resumable()
def run_negatives(args: argparse.Namespace) -> None:
    """Write the rows of `args.data` with hard negatives to `args.output`, and print what was mined."""
    output, files = Path(args.output), find_files(args.data)
    corpus_path = Path(args.corpus or "")
    corpus_path = corpus_path / "corpus.jsonl" if corpus_path.is_dir() else corpus_path
    check_output(output, args.overwrite, [*files, corpus_path, args.model, args.reranker])
    by = args.by or ("model" if args.model else "bm25")
    if by != "bm25" and not args.model:
        raise UserError(f"--by {by}: needs --model")
    margin = args.relative_margin
    if margin == "default":
        margin = RELATIVE_MARGIN if args.model or args.reranker else None
    rules = hard_negatives.Rules(
        by, args.skip, args.take, args.range_max, args.absolute_margin, margin, args.max_score, args.min_score,
        args.sampling, args.seed, args.language,
    )  # fmt: skip
    corpus = run.open_corpus(args.corpus, args.field, args.es_fields)
    run.check_margins(corpus, rules, bool(args.model or args.reranker))
    model = run.load_retriever(args.model, args.max_length, args.dtype) if args.model else None
    judge = None
    if args.reranker:
        judge = Teacher(args.reranker, "reranker", reranker_type=args.reranker_type, dtype=args.dtype)
    dtypes.warn("mine.py", model, judge and judge.model)
    with (
        cache_folder(output, args.work) as cache,
        run.naming_lines(files, args.corpus, args.field, args.ignore_keys, args.columns),
    ):
        negatives = mine_negatives(
            files,
            corpus,
            rules,
            cache,
            model,
            judge,
            args.skip_bad_rows,
            notify,
            args.ignore_keys,
            args.columns,
        )
        print_negatives(negatives, rules)
        if not (negatives.mined.numbers >= 0).any():
            raise UserError("no negative was found: the corpus is small, or the filters are narrow")
        if judge and judge.cut:
            notify(f"the reranker truncated {quantity(judge.cut, 'document')}")
        count = negatives.write(output, args.scores)
    print_lines(
        [
            ("written", f"{output} ({quantity(count, 'row')})"),
            ("next", shell("python", "train.py", "--data", output, "--output", "adapters/m")),
        ]
    )


def print_negatives(negatives: run.Negatives, rules: hard_negatives.Rules) -> None:
    """Print the counts of texts, a table of scores, a table of what was left out, and the count of negatives."""
    texts, mined = negatives.texts, negatives.mined
    rows, distinct = len(texts.row_query), len(texts.documents)
    print_lines(
        [
            ("rows", f"{rows:,}, {quantity(len(texts.queries), 'distinct query')}"),
            ("documents", f"{distinct:,} distinct of {texts.read:,}; case and white space do not count"),
        ]
    )
    taken = mined.numbers[texts.row_query] >= 0
    print_scores(negatives.scored_by, mined.known[texts.row_pairs], mined.scores[texts.row_query][taken])
    _, candidates, *counts = mined.counts.tolist()
    total = candidates + counts[0]
    reasons = zip(hard_negatives.REASONS.items(), counts, strict=True)
    table = [[f"{reason}: {text}", f"{n:,}", f"{n / total:.1%}"] for (reason, text), n in reasons if n]
    if table:
        print_rows(f"Left out of the best {rules.depth} documents of each query", ("reason", "count", "share"), table)
    of_row = taken.sum(axis=1)
    few, none = int((of_row < rules.take).sum()), int((of_row == 0).sum())
    fewer = f"; {quantity(few, 'row')} with fewer than {rules.take}, {none:,} of them none"
    print_lines([("negatives", f"{taken.sum():,}" + fewer * bool(few))])
    if few:
        print_lines([("for more", "--range-max N looks at more documents, --relative-margin off filters less")])


def add_negatives(commands: argparse._SubParsersAction) -> None:
    rules = hard_negatives.Rules()
    out = commands.add_parser(
        "negatives",
        help="hard negatives for rows of queries and positives",
        description="Write the rows with hard negatives: documents that rank high for a query and are not known "
        "positives of it. The documents are those of --corpus and of the rows; negatives that rows already have are "
        "documents like any other. The best --range-max documents of a query pass through the filters; of the rest, "
        "--skip leaves out the first, and --take of the next become negatives. The filters have the names and meanings "
        "of sentence-transformers' mine_hard_negatives. They compare scores of the reranker, else of the model, "
        "else of BM25. Rows with the same query get the same negatives.",
    )
    add_files(out, "rows with a query and a positive, in train.py's formats")
    flag = out.add_argument
    flag("--corpus", type=user_path, metavar="FILE", help="JSON lines, .txt, a BEIR folder, or es://INDEX, which then "
         "also ranks by BM25 (default: only the documents of the rows)")  # fmt: skip
    flag("--es-fields", default=columns.ELASTIC_DEFAULT, metavar="TEXT", help="with --corpus es://: "
         "document=FIELD+FIELD names the fields of a document (default: title+snippet)")  # fmt: skip
    flag("--field", metavar="KEY", help="key of the text in --corpus (default: title and text, ...)")
    flag("--model", "--model-path", type=user_path, metavar="MODEL", help="embedding or late-interaction model: "
         "adapter folder, base model's folder or GGUF, or hub name")  # fmt: skip
    flag("--max-length", type=int, metavar="N", help="truncate documents to N tokens (default: as saved)")
    flag("--dtype", choices=backend.DTYPES, help=DTYPE_HELP)
    flag("--dequantize", choices=backend.DEQUANTIZE, default="auto", help=DEQUANTIZE_HELP)
    flag("--by", choices=hard_negatives.BY, help="what ranks the documents; both: reciprocal rank fusion (default: "
         "model; bm25 without --model)")  # fmt: skip
    flag("--language", default=rules.language, metavar="NAME", help="language of BM25's stems and stop words, such as "
         "german; none = neither stems nor stop words (default: %(default)s)")  # fmt: skip
    flag(
        "--reranker",
        type=user_path,
        metavar="MODEL",
        help="its scores decide order and filters; a late-interaction model works too",
    )
    flag("--reranker-type", choices=RERANKERS, metavar="KIND", help="kind of reranker, if its files do not say")
    flag("--skip", "--range-min", type=int, default=rules.skip, metavar="K", help="leave out the first K documents "
         "that passed the filters (default: %(default)s)")  # fmt: skip
    flag("--take", "--num-negatives", type=int, default=rules.take, metavar="N", help="negatives of a query (default: "
         "%(default)s)")  # fmt: skip
    flag("--range-max", type=int, metavar="N", help="documents of a query to look at (default: skip + 10 * take)")
    flag("--sampling", "--sampling-strategy", choices=hard_negatives.SAMPLING, default="top", help="take the first, "
         "or random ones (default: %(default)s)")  # fmt: skip
    flag("--seed", type=int, default=0, metavar="N", help="for --sampling random (default: %(default)s)")
    flag("--absolute-margin", type=_margin, metavar="X", help="leave out documents that score above the query's "
         "lowest positive minus X (default: off)")  # fmt: skip
    flag("--relative-margin", type=_margin, default="default", metavar="X", help="leave out documents that score "
         f"above that positive minus X times its size (default: {RELATIVE_MARGIN}; with BM25 scores: off)")  # fmt: skip
    flag("--max-score", type=float, metavar="X", help="leave out documents that score above X (default: off)")
    flag("--min-score", type=float, metavar="X", help="leave out documents that score below X (default: off)")
    flag("--scores", action="store_true", help="write the scores of positive and negatives, for distillation")
    out.set_defaults(run=run_negatives)


def _margin(text: str) -> float | str | None:
    """Parse a margin: a number, or None for "off"."""
    return None if text == "off" else text if text == "default" else float(text)


# --- score ------------------------------------------------------------------------------------------------------------


@resumable()
def run_score(args: argparse.Namespace) -> None:
    """Write the rows of `args.data` with a teacher's scores to `args.output`, and print a table of the scores."""
    if args.vectors:
        write_vectors(args)
        return
    output, files = Path(args.output), find_files(args.data)
    check_output(output, args.overwrite, [*files, args.teacher])
    counts, skipped = run.count_rows(files, args.skip_bad_rows, notify, args.ignore_keys, args.columns)
    settings = (args.max_length, args.reranker_type, args.raw_scores, args.dtype)
    teacher = Teacher(args.teacher, args.teacher_kind, *settings)
    name = teacher.model.name
    print_lines([("teacher", f"{name}, {teacher.kind}, {describe_dtype(teacher.model.model.backbone)}")])
    with (
        cache_folder(output, args.work) as cache,
        run.naming_lines(files, ignore_keys=args.ignore_keys, columns=args.columns),
    ):
        chosen = (args.ignore_keys, args.columns)
        count = run.score_rows(files, output, teacher, counts, cache, skipped, notify, *chosen)
    if teacher.cut:
        notify(f"the reranker truncated {quantity(teacher.cut, 'document')} (--max-length)")
    print_scores(name, counts.positives, counts.negatives, "negatives" if counts.positives else "documents")
    if counts.positives:
        beaten, share = quantity(counts.beaten, "row"), counts.beaten / len(counts.positives)
        print_lines(
            [
                (
                    "rivals",
                    f"{beaten} with a negative that scores above the positive ({share:.1%})",
                )
            ]
        )
    print_lines(
        [
            ("written", f"{output} ({quantity(count, 'row')}, {quantity(counts.documents, 'score')})"),
            ("next", shell("python", "train.py", "--data", output, "--loss", "kl_distill")),
            ("or", "with --task rerank, or with --loss margin_mse"),
        ]
    )


def write_vectors(args: argparse.Namespace) -> None:
    """Write the teacher's vectors of all texts of `args.data` to `args.output`."""
    output = Path(args.output)
    if args.teacher_kind == "reranker" or args.reranker_type or args.raw_scores:
        raise UserError("--vectors: a reranker has none; name an embedding model as --teacher")
    if output.suffix != ENDING:
        raise UserError(f"--output {output}: vectors are written to a file whose name ends in {ENDING}")
    files = [*find_files(args.data), *find_validation(args.data), *hub_validations(args.data)]
    check_output(output, args.overwrite, [*files, args.teacher])
    model = run.load_retriever(args.teacher, args.max_length, args.dtype, "--teacher")
    print_lines([("teacher", f"{model.name}, {describe_dtype(model.model.backbone)}")])
    skipped = [] if args.skip_bad_rows else None
    chosen = (args.ignore_keys, args.columns)
    with cache_folder(output, args.work) as cache, run.naming_lines(files, ignore_keys=chosen[0], columns=chosen[1]):
        texts = run.write_vectors(files, output, model, cache, skipped, notify, *chosen)
    count = f"{quantity(len(texts), 'vector')} of {model.dimensions:,} dimensions"
    flags = ("--loss", "distill_vectors", "--teacher-vectors", output)
    print_lines(
        [
            ("texts", f"{quantity(texts.queries, 'distinct query')}, {quantity(texts.documents, 'distinct document')}"),
            ("written", f"{output} ({count}, {output.stat().st_size / 1e6:,.1f} MB)"),
            ("next", shell("python", "train.py", "--model", "STUDENT", "--data", *args.data, *flags)),
            ("or", f"{shell('--guide', output)}: texts that it finds nearer than a positive are no negatives"),
        ]
    )


def add_score(commands: argparse._SubParsersAction) -> None:
    out = commands.add_parser(
        "score",
        help="a teacher's scores of rows with negatives, or its vectors of their texts, for distillation",
        description='Write the rows with "scores": of the positive and then the negatives, or of "documents". With '
        "--vectors, write the vectors of all texts instead, queries under the teacher's query prompt and documents "
        "under its document prompt, as one file that train.py --teacher-vectors and --guide read.",
    )
    add_files(out, "rows with negatives, or with documents; with --vectors, any rows")
    flag = out.add_argument
    flag(
        "--teacher", "--model", required=True, type=user_path, metavar="MODEL", help="a reranker, or an embedding model"
    )
    flag("--vectors", action="store_true", help=f"write the teacher's vectors, to --output NAME{ENDING}")
    flag("--teacher-kind", choices=KINDS, help="kind of teacher (default: as its files say; a language model whose "
         "files do not say is a reranker if its name has 'rerank')")  # fmt: skip
    flag("--reranker-type", choices=RERANKERS, metavar="KIND", help="kind of reranker, if its files do not say")
    flag("--max-length", type=int, metavar="N", help="truncate texts to N tokens (default: as saved)")
    flag("--dtype", choices=backend.DTYPES, help=DTYPE_HELP)
    flag("--dequantize", choices=backend.DEQUANTIZE, default="auto", help=DEQUANTIZE_HELP)
    flag("--raw-scores", action="store_true", help="logits of a reranker, not their sigmoid (default: as its files "
         "say; logits of a cross-encoder whose files do not say)")  # fmt: skip
    out.set_defaults(run=run_score)


# --- the command line -------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    out = Parser(prog="mine.py", description="Mine training data. `mine.py COMMAND --help` explains a command.")
    commands = out.add_subparsers(required=True, metavar="command")
    for add in (add_code, add_negatives, add_score):
        add(commands)
    return out


@command("mine.py", explain=device_errors.explain)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0; see docs/troubleshooting.md for the exit codes of errors."""
    backend.prepare()
    args = parser().parse_args(argv)
    backend.set_dequantize(getattr(args, "dequantize", "auto"))  # of the commands that take a model
    args.run(args)
    return 0


if __name__ == "__main__":
    imports.hide("torch", "wandb")
    sys.exit(main())
