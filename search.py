"""Search source code and texts by meaning and by words, on this machine.

python search.py index src docs --model-path adapters/final             # once, and again after changes
python search.py search "where are gradients cached"                    # path:line, score, snippet
python search.py search "readLine" --bm25 --top 5 --json
python search.py search "read a line" --language python --path src --format grep            # path:line:text
python search.py search "where are gradients cached" --rerank Qwen/Qwen3-Reranker-0.6B      # reranks the first 50
python search.py search "where are gradients cached" --store es://docs      # Elasticsearch, after embed.py --to
python search.py eval queries.jsonl                                     # bm25, semantic and hybrid side by side
python search.py tune queries.jsonl                                     # learns how to weigh words and meaning
python search.py serve --port 8080                                      # a page for your browser
python search.py mcp                                                    # for coding assistants, over standard input

A minute or two on this checkout: python search.py index . --model-path gemma-3-tiny-mlx

from search import Searcher
searcher = Searcher(".index")
for hit in searcher.search("where are gradients cached", top=5): print(hit.path, hit.line, hit.score)
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_retrieval.backend import device_errors

from mlx_retrieval import backend
from mlx_retrieval.dataset.beir import FolderRules, is_corpus
from mlx_retrieval.retrieval.base import LOCK, Hit
from mlx_retrieval.retrieval.fusion import FUSIONS
from mlx_retrieval.retrieval.hit_formats import grep_lines, hits_to_json, print_hits
from mlx_retrieval.retrieval.search_flags import check_flags, parser
from mlx_retrieval.retrieval.searcher import MissingModelError, Searcher
from mlx_retrieval.utils import files, imports, locks
from mlx_retrieval.utils.command import command
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.outputs import check_output
from mlx_retrieval.utils.text import quantity, shell

if TYPE_CHECKING:  # they load LanceDB and scipy, which takes a second
    from mlx_retrieval.evaluation.index_search import Query, Searched
    from mlx_retrieval.retrieval.indexer import Summary

__all__ = ["Hit", "Searcher"]


# --- output ---


def print_summary(summary: "Summary", folder: Path, is_corpus: bool) -> None:
    """Print the counts of an indexing run, and the files that were left out."""
    from mlx_retrieval.utils.console import console, print_lines, print_rows

    if summary.left_out:
        rows = [(reason, f"{count:,}") for reason, count in summary.left_out.most_common()]
        print_rows("left out", ("reason", "files"), rows)
    for package, count in summary.without_grammar.items():
        console().print(f"{count:,} files were split by lines, not by functions: pip install {package}, then --rebuild")
    flags = [] if folder == Path(".index") else ["--index", str(folder)]
    lines = [
        ("documents" if is_corpus else "files", f"{summary.files:,}"),
        ("chunks", f"{summary.chunks:,}"),
        ("embedded", f"{quantity(summary.embedded, 'chunk')} of {summary.changed:,} new or changed"),
        ("unchanged", f"{summary.unchanged:,}"),
        ("removed", f"{summary.removed:,}"),
        ("index", f"{folder}, {summary.size / 1e6:,.1f} MB"),
        ("seconds", f"{summary.seconds:,.1f}"),
        ("next", shell("python", "search.py", "search", "your question", *flags)),
    ]
    print_lines(lines)


# --- commands ---


def warn_if_slow(model: Any) -> None:
    """Print the dtype of a model for which it is slow on this device."""
    from mlx_retrieval.inference import dtypes

    dtypes.warn("search.py", model)


def index_command(args: argparse.Namespace) -> None:
    """Index a folder."""
    from mlx_retrieval.inference import dtypes, embedder
    from mlx_retrieval.retrieval.analyzer import check_language
    from mlx_retrieval.retrieval.forest import roots_of
    from mlx_retrieval.retrieval.index_folder import read_earlier
    from mlx_retrieval.retrieval.indexer import update

    if not 0 <= args.overlap < args.chunk_size:
        raise UserError(f"--overlap {args.overlap}: from 0 to below --chunk-size {args.chunk_size}")
    if args.token_pooling < 1:
        raise UserError(f"--token-pooling {args.token_pooling}: at least 1")
    roots, folder = [Path(path) for path in args.paths], Path(args.index)
    root, folders, _ = roots_of(roots)
    of_corpus = not folders and is_corpus(root)
    if of_corpus and not args.documents:
        before = read_earlier(folder, args.rebuild)
        if args.documents is not None or before is None or not before.documents:
            names = ("chunk_size", "overlap", "max_file_size", "exclude")
            args.flags.take_none(args, names, "without --documents, all documents of a corpus are indexed whole")
    if args.language:
        check_language(args.language)
    print(backend.describe(), file=sys.stderr)
    model = embedder.load(args.model_path, dtype=args.dtype)
    if not model.late:
        names = ("token_bits", "token_pooling")
        args.flags.take_none(args, names, f"{args.model_path} is no late-interaction model")
    dtypes.report(model)
    limits = (args.chunk_size, args.overlap, args.max_file_size, args.exclude)
    stored = {"token_bits": args.token_bits, "token_pooling": args.token_pooling, "documents": args.documents}
    summary = update(roots, folder, model, *limits, rebuild=args.rebuild, language=args.language, **stored)
    print_summary(summary, folder, of_corpus)


def search_command(args: argparse.Namespace) -> int:
    """Search an index. Return the exit code: 1 if --format grep finds nothing, as grep does."""
    searcher = opened(args, Searcher)
    info, root = searcher.index.info, searcher.index.root
    if reason := searcher.unfinished:
        print(f"search.py: {reason}", file=sys.stderr)
    if args.mode != "bm25":
        try:
            warn_if_slow(searcher.model)
        except MissingModelError as error:
            raise MissingModelError(f"{error}, or search with --bm25") from error
    how = (args.weight, args.rerank_depth, args.fusion or FUSIONS[0], args.language, args.paths)
    hits = searcher.search(args.query, args.mode, args.top, *how)
    if args.format == "json":
        print(hits_to_json(hits, args.query, args.mode, searcher.source))
    elif args.format == "grep":
        print(
            "".join(f"{line}\n" for line in grep_lines(hits, args.query, root, info.is_corpus, info.language)), end=""
        )
        return 0 if hits else 1
    else:
        print_hits(hits, args.query, root, info.is_corpus, info.language)
    return 0


def opened(args: argparse.Namespace, kind: type[Searcher], **options: Any) -> Searcher:
    """Return a searcher of this kind as the flags say, with the reranker loaded."""
    reranker = None
    if args.rerank:
        from mlx_retrieval.inference.reranker import Reranker

        reranker = Reranker(args.rerank, dtype=args.dtype)
        warn_if_slow(reranker)
    return kind(args.store or args.index, args.model_path, reranker, args.field, args.dtype, **options)


def serve_command(args: argparse.Namespace) -> int:
    """Serve a page that searches an index, until Ctrl-C."""
    from mlx_retrieval.retrieval import search_app

    searcher = opened(args, search_app.ServedSearcher, depth=args.rerank_depth)
    with suppress(KeyboardInterrupt):  # the way to end a server: no message
        search_app.run(searcher, args.host, args.port)
    return 130


def mcp_command(args: argparse.Namespace) -> None:
    """Answer a coding assistant until it closes standard input."""
    from mlx_retrieval.retrieval import search_mcp

    search_mcp.run(opened(args, Searcher), args.rerank_depth)


def searched(args: argparse.Namespace) -> "tuple[Searcher, list[Query], list[Searched]]":
    """Return the index of an evaluation, its questions and their hits. Notes on standard error tell what is odd."""
    from mlx_retrieval.evaluation import index_answers, index_search

    queries = index_search.read_queries(args.queries, FolderRules(args.strict, args.ignore_identical_ids))
    searcher = Searcher(args.store or args.index, args.model_path, field=args.field, dtype=args.dtype)
    index = searcher.index
    queries, notes = index_answers.checked(queries, index)
    results = index_search.search(index, searcher.model, queries)
    for note in [*notes, *index_search.notes_on_quoted(queries, results)]:
        print(f"search.py: {note}", file=sys.stderr)
    return searcher, queries, results


def eval_command(args: argparse.Namespace) -> None:
    """Evaluate the search of an index."""
    from mlx_retrieval.evaluation import index_search

    output = Path(args.output) if args.output else None
    if output:
        check_output(output, args.overwrite, (args.queries, args.index, args.model_path))
    if args.weight is not None and not 0 <= args.weight <= 1:
        raise UserError(f"--weight {args.weight}: between 0 and 1")
    searcher, queries, results = searched(args)
    how = (args.weight, args.fusion or FUSIONS[0], results)
    evaluations = index_search.evaluate(searcher.index, searcher.model, queries, *how)
    index_search.print_table(Path(args.queries).resolve().name, evaluations)
    if output:
        files.write_file(output, json.dumps(index_search.to_json(evaluations), indent=2) + "\n", f"--output {output}")


def tune_command(args: argparse.Namespace) -> None:
    """Learn how the search of an index weighs words and meaning, and keep it if that helps; or forget it."""
    from mlx_retrieval.evaluation import index_search, index_tuning
    from mlx_retrieval.utils.console import print_lines

    lock = Path(args.index) / LOCK
    busy = f"--index {args.index}: another process is indexing"
    described = index_tuning.described
    with nullcontext() if args.store or not lock.parent.is_dir() else locks.only_one(lock, busy):
        if args.forget:
            searcher = Searcher(args.store or args.index, field=args.field)
            before, now = map(described, index_tuning.forget(searcher.index))
            print_lines([("before", before), ("now", f"{now}, the defaults")])
            return
        searcher, queries, results = searched(args)
        tuned = index_tuning.Tuner(searcher.index, queries, results).tune()
        index_search.print_figures(f"{Path(args.queries).resolve().name}, tuned by cross-validation", tuned.evaluations)
        changes = index_search.differences(tuned.evaluations, "hybrid")
        index_search.print_differences("difference to hybrid as it was", changes)
        if tuned.helps:
            index_tuning.keep(searcher.index, tuned.settings)
    verdict = ("kept", described(tuned.settings)) if tuned.helps else ("unchanged", "what was learnt is no better")
    lines = [("before", described(tuned.before)), verdict]
    if tuned.helps:
        given = [f"--{name}={value}" for name in ("store", "field") if (value := getattr(args, name))]
        given += [f"--index={args.index}"] if args.index != ".index" else []
        lines.append(("defaults", shell("python", "search.py", "tune", "--forget", *given)))
    print_lines(lines)


COMMANDS = {
    "index": index_command,
    "search": search_command,
    "eval": eval_command,
    "tune": tune_command,
    "serve": serve_command,
    "mcp": mcp_command,
}


@command("search.py", explain=device_errors.explain)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, 1 if `--format grep` finds nothing, 2 for an error of the user, 130 after Ctrl-C."""
    backend.prepare()
    args = parser().parse_args(argv)
    check_flags(args)
    backend.set_compile(args.compile)
    backend.set_dequantize(args.dequantize)
    try:
        return COMMANDS[args.command](args) or 0
    except KeyboardInterrupt as stop:
        hint = "; run the same command to continue" if args.command == "index" else ""
        raise KeyboardInterrupt(f"stopped{hint}") from stop


if __name__ == "__main__":
    imports.hide("torch", "wandb")
    sys.exit(main())
