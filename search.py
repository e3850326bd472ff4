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
from mlx_retrieval.dataset import chunks
from mlx_retrieval.dataset.beir import FolderRules, is_corpus
from mlx_retrieval.dataset.documents.folder import MAX_FILE_SIZE
from mlx_retrieval.dataset.source_code import file_tree
from mlx_retrieval.retrieval.base import LOCK, TOKEN_BITS, Hit
from mlx_retrieval.retrieval.fusion import FUSIONS, WEIGHTS
from mlx_retrieval.retrieval.hit_formats import FORMATS, grep_lines, hits_to_json, print_hits
from mlx_retrieval.retrieval.searcher import DEPTH, MODES, MissingModelError, Searcher
from mlx_retrieval.utils import files, imports, locks
from mlx_retrieval.utils.command import COMPILE_HELP, DEQUANTIZE_HELP, DTYPE_HELP, Parser, command, user_path
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.outputs import check_output
from mlx_retrieval.utils.text import quantity, shell, writable

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
    from mlx_retrieval.retrieval.indexer import update

    if not 0 <= args.overlap < args.chunk_size:
        raise UserError(f"--overlap {args.overlap}: from 0 to below --chunk-size {args.chunk_size}")
    if args.token_pooling < 1:
        raise UserError(f"--token-pooling {args.token_pooling}: at least 1")
    roots = [Path(path) for path in args.paths]
    roots_of(roots)
    if args.language:
        check_language(args.language)
    print(backend.describe(), file=sys.stderr)
    folder, model = Path(args.index), embedder.load(args.model_path, dtype=args.dtype)
    dtypes.report(model)
    limits = (args.chunk_size, args.overlap, args.max_file_size, args.exclude)
    stored = {"token_bits": args.token_bits, "token_pooling": args.token_pooling, "documents": args.documents}
    summary = update(roots, folder, model, *limits, rebuild=args.rebuild, language=args.language, **stored)
    print_summary(summary, folder, len(roots) == 1 and is_corpus(roots[0]))


def search_command(args: argparse.Namespace) -> int:
    """Search an index. Return the exit code: 1 if --format grep finds nothing, as grep does."""
    if args.mode != "hybrid" and (flag := "weight" if args.weight is not None else "fusion" if args.fusion else ""):
        raise UserError(f"--{flag} is for --hybrid")
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
    check_store(args)
    reranker = None
    if args.rerank:
        from mlx_retrieval.inference.reranker import Reranker

        reranker = Reranker(args.rerank, dtype=args.dtype)
        warn_if_slow(reranker)
    return kind(args.store or args.index, args.model_path, reranker, args.field, args.dtype, **options)


def serve_command(args: argparse.Namespace) -> int:
    """Serve a page that searches an index, until Ctrl-C."""
    from mlx_retrieval.retrieval import search_app

    if args.rerank_depth < 1:
        raise UserError(f"--rerank-depth {args.rerank_depth}: at least 1")
    searcher = opened(args, search_app.ServedSearcher, depth=args.rerank_depth)
    with suppress(KeyboardInterrupt):  # the way to end a server: no message
        search_app.run(searcher, args.host, args.port)
    return 130


def mcp_command(args: argparse.Namespace) -> None:
    """Answer a coding assistant until it closes standard input."""
    from mlx_retrieval.retrieval import search_mcp

    search_mcp.run(opened(args, Searcher), args.rerank_depth)


def check_store(args: argparse.Namespace) -> None:
    """Raise UserError for --field without --store."""
    if args.field and not args.store:
        raise UserError("--field is for --store")


def searched(args: argparse.Namespace) -> "tuple[Searcher, list[Query], list[Searched]]":
    """Return the index of an evaluation, its questions and their hits. Notes on standard error tell what is odd."""
    from mlx_retrieval.evaluation import index_search

    check_store(args)
    queries = index_search.read_queries(args.queries, FolderRules(args.strict, args.ignore_identical_ids))
    searcher = Searcher(args.store or args.index, args.model_path, field=args.field, dtype=args.dtype)
    index = searcher.index
    queries, notes = index_search.checked(queries, index.known(index_search.wanted(queries)), str(index.folder))
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
    """Learn how the search of an index weighs words and meaning, and keep it if that helps."""
    from mlx_retrieval.evaluation import index_search, index_tuning
    from mlx_retrieval.utils.console import print_lines

    lock = Path(args.index) / LOCK
    busy = f"--index {args.index}: another process is indexing"
    with nullcontext() if args.store or not lock.parent.is_dir() else locks.only_one(lock, busy):
        searcher, queries, results = searched(args)
        tuned = index_tuning.Tuner(searcher.index, queries, results).tune()
        index_search.print_figures(f"{Path(args.queries).resolve().name}, tuned by cross-validation", tuned.evaluations)
        changes = index_search.differences(tuned.evaluations, "hybrid")
        index_search.print_differences("difference to hybrid as it was", changes)
        if tuned.helps:
            index_tuning.keep(searcher.index, tuned.settings)
    described = index_tuning.described
    verdict = ("kept", described(tuned.settings)) if tuned.helps else ("unchanged", "what was learnt is no better")
    print_lines([("before", described(tuned.before)), verdict])


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    shared = Parser(add_help=False)
    shared.add_argument("--dtype", choices=backend.DTYPES, help=DTYPE_HELP)
    shared.add_argument(
        "--index", default=".index", type=user_path, metavar="DIR", help="folder of the index (default: .index)"
    )
    shared.add_argument("--compile", choices=backend.COMPILE, default="auto", help=COMPILE_HELP)
    shared.add_argument("--dequantize", choices=backend.DEQUANTIZE, default="auto", help=DEQUANTIZE_HELP)
    top = Parser(prog="search.py", description="Search source code and texts by meaning and by words.")
    commands = top.add_subparsers(dest="command", required=True)

    index = "index folders, or update an index: only new and changed files are embedded"
    index = commands.add_parser("index", parents=[shared], help=index, description=index)
    folders = "folders of source code and texts, or one with corpus.jsonl (BEIR)"
    index.add_argument("paths", nargs="+", type=user_path, metavar="PATH", help=folders)
    model = "adapter folder, base model's folder or GGUF, or hub name"
    index.add_argument("--model-path", "--model", required=True, type=user_path, metavar="MODEL", help=model)
    size = "maximum characters in a chunk; longer functions and sections are split (default: %(default)s)"
    index.add_argument("--chunk-size", type=int, default=chunks.MAX_CHARACTERS, metavar="N", help=size)
    overlap = "most characters, in whole lines, that parts of one function or section share (default: %(default)s)"
    index.add_argument("--overlap", type=int, default=chunks.OVERLAP, metavar="N", help=overlap)
    largest = (
        f"leave out files of more than N bytes (default: {file_tree.MAX_FILE_SIZE:,}; of PDF, Word and HTML, and with "
        f"--documents of all, {MAX_FILE_SIZE:,})"
    )
    index.add_argument("--max-file-size", type=int, metavar="N", help=largest)
    exclude = "leave out matching files, in addition to .gitignore and in its syntax; repeatable"
    index.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help=exclude)
    spoken = (
        "language of the stems and stop words of a search by words, such as german; none = neither stems nor stop "
        "words (default: the index's, or english). Another one embeds nothing again"
    )
    index.add_argument("--language", metavar="NAME", help=spoken)
    bits = "late interaction: bits of a dimension of a stored token vector (default: %(default)s)"
    index.add_argument("--token-bits", type=int, choices=(1, 2, 4, 8), default=TOKEN_BITS, metavar="N", help=bits)
    pooled = "late interaction: merge the N most similar token vectors of a chunk, on average; 1 = none (default)"
    index.add_argument("--token-pooling", type=int, default=1, metavar="N", help=pooled)
    documents = (
        "read the folders as adapt.py does: rows of CSV and JSON lines, sections of reStructuredText and all other "
        "formats, below their titles; no hidden files, no boilerplate (default: as the index was made, else by lines)"
    )
    index.add_argument("--documents", action=argparse.BooleanOptionalAction, help=documents)
    rebuild = "replace the index, for another model or other settings"
    index.add_argument("--rebuild", action="store_true", help=rebuild)
    index.set_defaults(run=index_command)

    placed = Parser(add_help=False)
    store = "an Elasticsearch index whose vectors embed.py --to wrote, instead of --index"
    placed.add_argument("--store", metavar="es://INDEX", help=store)
    placed.add_argument("--field", metavar="NAME", help="with --store: the field of vectors (default: the only one)")
    moved = "the index's model, if it has moved since indexing (default: where it was)"
    placed.add_argument("--model-path", "--model", type=user_path, metavar="MODEL", help=moved)
    fused = Parser(add_help=False)
    weight = (
        "share of the meaning in hybrid, 0 = words only, 1 = meaning only (default: as tuned, else "
        f"{WEIGHTS['scores']}; of ranks {WEIGHTS['ranks']})"
    )
    fused.add_argument("--weight", type=float, metavar="W", help=weight)
    fusion = "what hybrid adds: scores, each scaled to 0 to 1, or reciprocal ranks (default: scores)"
    fused.add_argument("--fusion", choices=FUSIONS, help=fusion)

    reranked = Parser(add_help=False)
    reranker = "sort the first hits with this reranker: adapter folder, model's folder or GGUF, or hub name"
    reranked.add_argument("--rerank", type=user_path, metavar="MODEL", help=reranker)
    depth = f"hits that the reranker scores (default: {DEPTH})"
    reranked.add_argument("--rerank-depth", "--depth", type=int, default=DEPTH, metavar="N", help=depth)

    search = "search an index: path:line, score and two lines of each hit"
    search = commands.add_parser("search", parents=[shared, placed, fused, reranked], help=search, description=search)
    search.add_argument("query", type=writable, metavar="QUERY", help="plain words; there are no operators")
    modes = search.add_mutually_exclusive_group()
    texts = {
        "hybrid": "by words and meaning together",
        "semantic": "by meaning: cosine of vectors, or MaxSim",
        "bm25": "by words: BM25; needs no model",
    }
    for mode in MODES:
        text = texts[mode] + " (the default)" * (mode == MODES[0])
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, default=MODES[0], help=text)
    search.add_argument("--top", "--top-n", type=int, default=10, metavar="N", help="maximum hits (default: 10)")
    language = "only chunks in this programming language, markdown or text; repeatable"
    search.add_argument("--language", action="append", default=[], metavar="NAME", help=language)
    where = "only this file or folder, at any depth if it has no slash; * and ? stand for any characters; repeatable"
    search.add_argument("--path", dest="paths", action="append", default=[], metavar="PATTERN", help=where)
    form = "text; json = one object with the full text of each chunk; grep = path:line:text, exit code 1 for no hit"
    search.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=form)
    short = "the same as --format json"
    search.add_argument("--json", dest="format", action="store_const", const="json", help=short)
    search.set_defaults(run=search_command)

    asked = Parser(add_help=False)
    rows = "JSON lines with query and path, path and line, or relevant (a list); or a folder in BEIR layout"
    asked.add_argument("queries", type=user_path, metavar="QUERIES", help=rows)
    strict = "refuse an untidy BEIR folder: contradicting judgements, judgements of missing texts, null texts"
    asked.add_argument("--strict", action="store_true", help=strict)
    identical = "leave out of a query's hits the document that has its id, as BEIR does"
    asked.add_argument("--ignore-identical-ids", action="store_true", help=identical)
    evaluate = "P@1, MRR@10 and nDCG@10 of bm25, semantic and hybrid, with intervals for their differences"
    evaluate = commands.add_parser("eval", parents=[shared, placed, fused, asked], help=evaluate, description=evaluate)
    evaluate.add_argument(
        "--output", type=user_path, metavar="FILE", help="also write the figures to this file, as JSON"
    )
    evaluate.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    evaluate.set_defaults(run=eval_command)

    tune = "learn the share of meaning, and the weights of path, name and docstring, from questions with answers"
    kept = f"{tune}. What is learnt is kept in the index if it is better by cross-validation."
    tune = commands.add_parser("tune", parents=[shared, placed, asked], help=tune, description=kept)
    tune.set_defaults(run=tune_command)

    serve = "serve a page that searches an index, and JSON behind it"
    serve = commands.add_parser("serve", parents=[shared, placed, reranked], help=serve, description=serve)
    host = "address to listen on (default: 127.0.0.1, this machine only); all who reach it can read the indexed texts"
    serve.add_argument("--host", default="127.0.0.1", help=host)
    port = "port to listen on; 0 = any free one (default: 8080)"
    serve.add_argument("--port", type=int, default=8080, metavar="N", help=port)
    serve.set_defaults(run=serve_command)

    mcp = "answer coding assistants over standard input and output: an MCP server with the tools search and open"
    mcp = commands.add_parser("mcp", parents=[shared, placed, reranked], help=mcp, description=mcp)
    mcp.set_defaults(run=mcp_command)
    return top


@command("search.py", explain=device_errors.explain)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, 1 if `--format grep` finds nothing, 2 for an error of the user, 130 after Ctrl-C."""
    backend.prepare()
    args = parser().parse_args(argv)
    backend.set_compile(args.compile)
    backend.set_dequantize(args.dequantize)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt as stop:
        hint = "; run the same command to continue" if args.command == "index" else ""
        raise KeyboardInterrupt(f"stopped{hint}") from stop


if __name__ == "__main__":
    imports.hide("torch", "wandb")
    sys.exit(main())
