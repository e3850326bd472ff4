"""Search source code and texts by meaning and by words, on this machine.

python search.py index src --model-path adapters/final                  # once, and again after changes
python search.py search "where are gradients cached"                    # path:line, score, snippet
python search.py search "readLine" --bm25 --top 5 --json
python search.py search "where are gradients cached" --rerank Qwen/Qwen3-Reranker-0.6B      # reranks the first 50
python search.py search "where are gradients cached" --store es://docs      # Elasticsearch, after embed.py --to
python search.py eval queries.jsonl                                     # bm25, semantic and hybrid side by side

A minute or two on this checkout: python search.py index . --model-path gemma-3-tiny-mlx

from search import Searcher
searcher = Searcher(".index")
for hit in searcher.search("where are gradients cached", top=5): print(hit.path, hit.line, hit.score)
"""

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_retrieval.backend import device_errors

from mlx_retrieval import backend
from mlx_retrieval.dataset import chunks
from mlx_retrieval.dataset.beir import FolderRules, is_corpus
from mlx_retrieval.dataset.documents.folder import MAX_FILE_SIZE
from mlx_retrieval.dataset.source_code import file_tree
from mlx_retrieval.retrieval.base import Hit
from mlx_retrieval.retrieval.searcher import DEPTH, MODES, Searcher
from mlx_retrieval.retrieval.snippets import matching_spans, snippet
from mlx_retrieval.utils import files, imports
from mlx_retrieval.utils.command import COMPILE_HELP, DTYPE_HELP, Parser, command
from mlx_retrieval.utils.errors import Place, UserError
from mlx_retrieval.utils.outputs import check_output
from mlx_retrieval.utils.text import quantity, shell, writable

if TYPE_CHECKING:  # loads LanceDB, which takes a second
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


def print_hits(hits: Sequence[Hit], query: str, root: Path, is_corpus: bool) -> None:
    """Print path:line, score, name and two lines of each hit."""
    from rich.text import Text

    from mlx_retrieval.utils.console import console

    for hit in hits:
        place = hit.path if is_corpus else str(Place(_relative(root / hit.path), hit.line or None))
        console().print(
            Text.assemble((place, "cyan"), f"  {hit.score:.4f}", (f"  {hit.name}" if hit.name else "", "dim"))
        )
        rows = snippet(hit.text, query)
        lines = textwrap.dedent("\n".join(line for _, line in rows)).split("\n")
        for (row, _), line in zip(rows, lines, strict=True):
            number = f"{hit.line + row:>6} " if hit.line and not is_corpus else ""
            text = Text(line.rstrip()[:160])
            for span in matching_spans(text.plain, query):
                text.stylize("bold yellow", *span)
            console().print(Text.assemble((f"{number:>7}", "dim"), text))
    if not hits:
        console().print("nothing found")


def _relative(path: Path) -> str:
    """Return a path relative to the current folder if it is inside it."""
    here = Path.cwd()
    return os.path.relpath(path, here) if path.is_relative_to(here) else str(path)


def hits_to_json(hits: Sequence[Hit], query: str, mode: str, root: Path) -> str:
    """Return the hits as one JSON object."""
    fields = ("path", "line", "end_line", "language", "kind", "name", "score", "text")
    results = [{name: getattr(hit, name) for name in fields} for hit in hits]
    return json.dumps({"mode": mode, "query": query, "root": str(root), "results": results}, ensure_ascii=False)


# --- commands ---


def warn_if_slow(model: Any) -> None:
    """Print the dtype of a model for which it is slow on this device."""
    from mlx_retrieval.inference import dtypes

    dtypes.warn("search.py", model)


def index_command(args: argparse.Namespace) -> None:
    """Index a folder."""
    from mlx_retrieval.inference import dtypes, embedder
    from mlx_retrieval.retrieval.indexer import update

    if not 0 <= args.overlap < args.chunk_size:
        raise UserError(f"--overlap {args.overlap}: from 0 to below --chunk-size {args.chunk_size}")
    if not (root := Path(args.path).expanduser()).is_dir():
        raise UserError(f"{args.path}: no such folder")
    print(backend.describe(), file=sys.stderr)
    folder, model = Path(args.index), embedder.load(args.model_path, dtype=args.dtype)
    dtypes.report(model)
    limits = (args.chunk_size, args.overlap, args.max_file_size, args.exclude)
    print_summary(update(root, folder, model, *limits, rebuild=args.rebuild), folder, is_corpus(root))


def search_command(args: argparse.Namespace) -> None:
    """Search an index."""
    if args.weight is not None and args.mode != "hybrid":
        raise UserError("--weight is for --hybrid")
    if args.field and not args.store:
        raise UserError("--field is for --store")
    reranker, weight = None, 0.5 if args.weight is None else args.weight
    if args.rerank:
        from mlx_retrieval.inference.reranker import Reranker

        reranker = Reranker(args.rerank, dtype=args.dtype)
        warn_if_slow(reranker)
    searcher = Searcher(args.store or args.index, args.model_path, reranker, args.field, args.dtype)
    if not searcher.index.info.complete:
        print(
            "search.py: indexing was not finished, so some files are missing (search.py index continues)",
            file=sys.stderr,
        )
    if args.mode != "bm25":
        warn_if_slow(searcher.model)
    hits = searcher.search(args.query, args.mode, args.top, weight, args.rerank_depth)
    if args.json:
        print(hits_to_json(hits, args.query, args.mode, searcher.index.root))
    else:
        print_hits(hits, args.query, searcher.index.root, searcher.index.info.is_corpus)


def eval_command(args: argparse.Namespace) -> None:
    """Evaluate the search of an index."""
    from mlx_retrieval.evaluation import index_search

    output = Path(args.output).expanduser() if args.output else None
    if output:
        check_output(output, args.overwrite, (args.queries, args.index, args.model_path))
    if not 0 <= args.weight <= 1:
        raise UserError(f"--weight {args.weight}: between 0 and 1")
    queries = index_search.read_queries(args.queries, FolderRules(args.strict, args.ignore_identical_ids))
    searcher = Searcher(args.index, args.model_path, dtype=args.dtype)
    queries, missing = index_search.resolve(queries, searcher.index)
    if missing:
        print(f"search.py: {missing:,} of the answers are not in {args.index}: no search finds them", file=sys.stderr)
    evaluations = index_search.evaluate(searcher.index, searcher.model, queries, args.weight)
    index_search.print_table(Path(args.queries).resolve().name, evaluations)
    if output:
        files.write_file(output, json.dumps(index_search.to_json(evaluations), indent=2) + "\n", f"--output {output}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    shared = Parser(add_help=False)
    shared.add_argument("--dtype", choices=backend.DTYPES, help=DTYPE_HELP)
    shared.add_argument("--index", default=".index", metavar="DIR", help="folder of the index (default: .index)")
    shared.add_argument("--compile", choices=backend.COMPILE, default="auto", help=COMPILE_HELP)
    top = Parser(prog="search.py", description="Search source code and texts by meaning and by words.")
    commands = top.add_subparsers(dest="command", required=True)

    index = "index a folder, or update an index: only new and changed files are embedded"
    index = commands.add_parser("index", parents=[shared], help=index, description=index)
    index.add_argument("path", metavar="PATH", help="folder of source code and texts, or one with corpus.jsonl (BEIR)")
    model = "adapter folder, base model's folder or GGUF, or hub name"
    index.add_argument("--model-path", "--model", required=True, metavar="MODEL", help=model)
    size = "maximum characters in a chunk; longer functions and sections are split (default: %(default)s)"
    index.add_argument("--chunk-size", type=int, default=chunks.MAX_CHARACTERS, metavar="N", help=size)
    overlap = "characters, in whole lines, that the parts of a split function share at most (default: %(default)s)"
    index.add_argument("--overlap", type=int, default=chunks.OVERLAP, metavar="N", help=overlap)
    largest = (
        f"leave out files of more than N bytes (default: {file_tree.MAX_FILE_SIZE:,}; of PDF, Word and HTML "
        f"{MAX_FILE_SIZE:,})"
    )
    index.add_argument("--max-file-size", type=int, metavar="N", help=largest)
    exclude = "leave out matching files, in addition to .gitignore and in its syntax; repeatable"
    index.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help=exclude)
    rebuild = "replace the index, for another model or other settings"
    index.add_argument("--rebuild", action="store_true", help=rebuild)
    index.set_defaults(run=index_command)

    moved = "the index's model, if it has moved since indexing (default: where it was)"
    weight = "share of the semantic ranks in hybrid, 0 = words only, 1 = meaning only (default: 0.5)"
    search = "search an index: path:line, score and two lines of each hit"
    search = commands.add_parser("search", parents=[shared], help=search, description=search)
    search.add_argument("query", type=writable, metavar="QUERY", help="plain words; there are no operators")
    modes = search.add_mutually_exclusive_group()
    meaning, fused = "by meaning: cosine of vectors (the default)", "both, fused by reciprocal ranks"
    for mode, text in zip(MODES, (meaning, fused, "by words: BM25; needs no model"), strict=True):
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, default=MODES[0], help=text)
    search.add_argument("--top", "--top-n", type=int, default=10, metavar="N", help="maximum hits (default: 10)")
    search.add_argument("--weight", type=float, metavar="W", help=weight)
    reranker = "sort the first hits with this reranker: adapter folder, model's folder or GGUF, or hub name"
    search.add_argument("--rerank", metavar="MODEL", help=reranker)
    depth = f"hits that the reranker scores (default: {DEPTH})"
    search.add_argument("--rerank-depth", "--depth", type=int, default=DEPTH, metavar="N", help=depth)
    store = "search an Elasticsearch index whose vectors embed.py --to wrote, instead of --index"
    search.add_argument("--store", metavar="es://INDEX", help=store)
    search.add_argument("--field", metavar="NAME", help="with --store: the field of vectors (default: the only one)")
    search.add_argument("--json", action="store_true", help="print one JSON object with the full text of each chunk")
    search.add_argument("--model-path", "--model", metavar="MODEL", help=moved)
    search.set_defaults(run=search_command)

    evaluate = "P@1, MRR@10 and nDCG@10 of bm25, semantic and hybrid, with intervals for their differences"
    evaluate = commands.add_parser("eval", parents=[shared], help=evaluate, description=evaluate)
    rows = "JSON lines with query and path, path and line, or relevant (a list); or a folder in BEIR layout"
    evaluate.add_argument("queries", metavar="QUERIES", help=rows)
    evaluate.add_argument("--weight", type=float, default=0.5, metavar="W", help=weight)
    strict = "refuse an untidy BEIR folder: contradicting judgements, judgements of missing texts, null texts"
    evaluate.add_argument("--strict", action="store_true", help=strict)
    identical = "leave out of a query's hits the document that has its id, as BEIR does"
    evaluate.add_argument("--ignore-identical-ids", action="store_true", help=identical)
    evaluate.add_argument("--output", metavar="FILE", help="also write the figures to this file, as JSON")
    evaluate.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    evaluate.add_argument("--model-path", "--model", metavar="MODEL", help=moved)
    evaluate.set_defaults(run=eval_command)
    return top


@command("search.py", explain=device_errors.explain)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, 2 for an error of the user, or 130 after Ctrl-C."""
    backend.prepare()
    args = parser().parse_args(argv)
    backend.set_compile(args.compile)
    try:
        args.run(args)
    except KeyboardInterrupt as stop:
        hint = "; run the same command to continue" if args.command == "index" else ""
        raise KeyboardInterrupt(f"stopped{hint}") from stop
    return 0


if __name__ == "__main__":
    imports.hide("torch", "wandb")
    sys.exit(main())
