"""The flags of search.py's commands, and which of them have no effect on what is to be done.

args = parser().parse_args(["search", "where are gradients cached", "--top", "5"])
check_flags(args)
"""

import argparse
import textwrap
from functools import partial
from pathlib import Path

from mlx_retrieval import backend
from mlx_retrieval.dataset import chunks
from mlx_retrieval.dataset.documents.folder import MAX_FILE_SIZE
from mlx_retrieval.dataset.source_code import file_tree
from mlx_retrieval.retrieval.base import TOKEN_BITS
from mlx_retrieval.retrieval.fusion import FUSIONS, WEIGHTS
from mlx_retrieval.retrieval.hit_formats import FORMATS
from mlx_retrieval.retrieval.searcher import DEPTH, MODES
from mlx_retrieval.utils.command import COMPILE_HELP, DEQUANTIZE_HELP, DTYPE_HELP, Parser, user_path
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import writable

QUESTIONS = """\
example of QUERIES, a question a line; paths are relative to the indexed folder:
  {"query": "where are gradients cached", "path": "training/trainer.py"}
  {"query": "where are gradients cached", "path": "training/trainer.py", "line": 120}
  {"query": "where are gradients cached", "relevant": ["training/trainer.py:120", "batching.py"]}"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; `flags` of what it parses is the parser of the command."""
    shared = Parser(add_help=False)
    shared.add_argument(
        "--index", default=".index", type=user_path, metavar="DIR", help="folder of the index (default: .index)"
    )
    computing = shared.add_argument_group("computing")
    computing.add_argument("--dtype", choices=backend.DTYPES, help=DTYPE_HELP)
    computing.add_argument("--compile", choices=backend.COMPILE, default="auto", help=COMPILE_HELP)
    computing.add_argument("--dequantize", choices=backend.DEQUANTIZE, default="auto", help=DEQUANTIZE_HELP)
    top = Parser(prog="search.py", description="Search source code and texts by meaning and by words.")
    commands = top.add_subparsers(dest="command", required=True)

    index = "index folders, or update an index: only new and changed files are embedded"
    index = commands.add_parser("index", parents=[shared], help=index, description=index)
    folders = "folders of source code and texts, or one with corpus.jsonl (BEIR)"
    index.add_argument("paths", nargs="+", type=user_path, metavar="PATH", help=folders)
    model = "adapter folder, base model's folder or GGUF, or hub name"
    index.add_argument("--model-path", "--model", required=True, type=user_path, metavar="MODEL", help=model)
    reading, late = index.add_argument_group("what is read"), index.add_argument_group("late interaction")
    size = "maximum characters in a chunk; longer functions and sections are split (default: %(default)s)"
    reading.add_argument("--chunk-size", type=int, default=chunks.MAX_CHARACTERS, metavar="N", help=size)
    overlap = "most characters, in whole lines, that parts of one function or section share (default: %(default)s)"
    reading.add_argument("--overlap", type=int, default=chunks.OVERLAP, metavar="N", help=overlap)
    largest = (
        f"leave out files of more than N bytes (default: {file_tree.MAX_FILE_SIZE:,}; of PDF, Word and HTML, and with "
        f"--documents of all, {MAX_FILE_SIZE:,})"
    )
    reading.add_argument("--max-file-size", type=int, metavar="N", help=largest)
    exclude = "leave out matching files, in addition to .gitignore and in its syntax; repeatable"
    reading.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help=exclude)
    spoken = (
        "language of the stems and stop words of a search by words, such as german; none = neither stems nor stop "
        "words (default: the index's, or english). Another one embeds nothing again"
    )
    index.add_argument("--language", metavar="NAME", help=spoken)
    bits = "bits of a dimension of a stored token vector (default: %(default)s)"
    late.add_argument("--token-bits", type=int, choices=(1, 2, 4, 8), default=TOKEN_BITS, metavar="N", help=bits)
    pooled = "merge the N most similar token vectors of a chunk, on average; 1 = none (default)"
    late.add_argument("--token-pooling", type=int, default=1, metavar="N", help=pooled)
    documents = (
        "read the folders as adapt.py does: rows of CSV and JSON lines, sections of reStructuredText and all other "
        "formats, below their titles; no hidden files, no boilerplate (default: as the index was made, else by lines)"
    )
    reading.add_argument("--documents", action=argparse.BooleanOptionalAction, help=documents)
    rebuild = "replace the index, for another model or other settings"
    index.add_argument("--rebuild", action="store_true", help=rebuild)
    index.set_defaults(flags=index)

    placed = Parser(add_help=False)
    store = "an Elasticsearch index whose vectors embed.py --to wrote, instead of --index"
    placed.add_argument("--store", metavar="es://INDEX", help=store)
    placed.add_argument("--field", metavar="NAME", help="with --store: the field of vectors (default: the only one)")
    moved = "the index's model, if it has moved since indexing (default: where it was)"
    placed.add_argument("--model-path", "--model", type=user_path, metavar="MODEL", help=moved)
    fused_flags = Parser(add_help=False)
    fused = fused_flags.add_argument_group("words and meaning together")
    weight = (
        "share of the meaning in hybrid, 0 = words only, 1 = meaning only (default: as tuned, else "
        f"{WEIGHTS['scores']}; of ranks {WEIGHTS['ranks']})"
    )
    fused.add_argument("--weight", type=float, metavar="W", help=weight)
    fusion = "what hybrid adds: scores, each scaled to 0 to 1, or reciprocal ranks (default: scores)"
    fused.add_argument("--fusion", choices=FUSIONS, help=fusion)

    reranked_flags = Parser(add_help=False)
    reranked = reranked_flags.add_argument_group("reranking")
    reranker = "sort the first hits with this reranker: adapter folder, model's folder or GGUF, or hub name"
    reranked.add_argument("--rerank", type=user_path, metavar="MODEL", help=reranker)
    depth = f"hits that the reranker scores (default: {DEPTH})"
    reranked.add_argument("--rerank-depth", "--depth", type=int, default=DEPTH, metavar="N", help=depth)

    search = "search an index: path:line, score and two lines of each hit"
    search = commands.add_parser(
        "search", parents=[shared, placed, fused_flags, reranked_flags], help=search, description=search
    )
    search.add_argument("query", type=writable, metavar="QUERY", help="plain words; there are no operators")
    modes = search.add_argument_group("by words, by meaning, or by both").add_mutually_exclusive_group()
    texts = {
        "hybrid": "by words and meaning together",
        "semantic": "by meaning: cosine of vectors, or MaxSim",
        "bm25": "by words: BM25; needs no model",
    }
    for mode in MODES:
        text = texts[mode] + " (the default)" * (mode == MODES[0])
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, default=MODES[0], help=text)
    search.add_argument("--top", "--top-n", type=int, default=10, metavar="N", help="maximum hits (default: 10)")
    filters, output = search.add_argument_group("filters"), search.add_argument_group("output")
    language = "only chunks in this programming language, markdown or text; repeatable"
    filters.add_argument("--language", action="append", default=[], metavar="NAME", help=language)
    where = (
        "only this file or folder below the indexed one, as hits show it; at any depth if it has no slash; * and ? "
        "stand for any characters; repeatable"
    )
    filters.add_argument("--path", dest="paths", action="append", default=[], metavar="PATTERN", help=where)
    form = "text; json = one object with the full text of each chunk; grep = path:line:text, exit code 1 for no hit"
    output.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=form)
    short = "the same as --format json"
    output.add_argument("--json", dest="format", action="store_const", const="json", help=short)
    search.set_defaults(flags=search)

    asked = Parser(add_help=False)
    rows = "questions: a file of JSON lines, as in the example below, or a folder in BEIR layout"
    strict = "refuse an untidy BEIR folder: contradicting judgements, judgements of missing texts, null texts"
    asked.add_argument("--strict", action="store_true", help=strict)
    identical = "leave out of a query's hits the document that has its id, as BEIR does"
    asked.add_argument("--ignore-identical-ids", action="store_true", help=identical)
    evaluate = "P@1, MRR@10 and nDCG@10 of bm25, semantic and hybrid, with intervals for their differences"
    about = {"epilog": QUESTIONS, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parents = {"parents": [shared, placed, fused_flags, asked]}
    evaluate = commands.add_parser("eval", **parents, help=evaluate, description=textwrap.fill(evaluate), **about)
    evaluate.add_argument("queries", type=user_path, metavar="QUERIES", help=rows)
    evaluate.add_argument(
        "--output", type=user_path, metavar="FILE", help="also write the figures to this file, as JSON"
    )
    evaluate.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    evaluate.set_defaults(flags=evaluate)

    tune = "learn the share of meaning, and the weights of path, name and docstring, from questions with answers"
    kept = f"{tune}. What is learnt is kept in the index if it is better by cross-validation; --forget takes it back."
    tune = commands.add_parser(
        "tune", parents=[shared, placed, asked], help=tune, description=textwrap.fill(kept), **about
    )
    known = tune.add_mutually_exclusive_group(required=True)
    known.add_argument("queries", nargs="?", type=user_path, metavar="QUERIES", help=rows)
    forget = "instead of learning, give the index its default weights again"
    known.add_argument("--forget", action="store_true", help=forget)
    tune.set_defaults(flags=tune)

    serve = "serve a page that searches an index, and JSON behind it"
    serve = commands.add_parser("serve", parents=[shared, placed, reranked_flags], help=serve, description=serve)
    host = "address to listen on (default: 127.0.0.1, this machine only); all who reach it can read the indexed texts"
    serve.add_argument("--host", default="127.0.0.1", help=host)
    port = "port to listen on; 0 = any free one (default: 8080)"
    serve.add_argument("--port", type=int, default=8080, metavar="N", help=port)
    serve.set_defaults(flags=serve)

    mcp = "answer coding assistants over standard input and output: an MCP server with the tools search and open"
    mcp = commands.add_parser("mcp", parents=[shared, placed, reranked_flags], help=mcp, description=mcp)
    mcp.set_defaults(flags=mcp)
    return top


def check_flags(args: argparse.Namespace) -> None:
    """Exit if a flag has no effect on what is to be done. Raises UserError for a value out of range."""
    given, refuse = vars(args).get, partial(args.flags.take_none, args)
    if given("rerank_depth", 1) < 1:
        raise UserError(f"--rerank-depth {args.rerank_depth}: at least 1")
    if given("field") and not given("store"):
        raise UserError("--field is for --store")
    if given("mode", "hybrid") != "hybrid" and (args.weight is not None or args.fusion):
        raise UserError(f"--{'fusion' if args.weight is None else 'weight'} is for --hybrid")
    if given("store"):
        refuse(["index"], "--store searches in Elasticsearch")
    if not given("rerank"):
        refuse(["rerank_depth"], "--rerank-depth is for --rerank")
    if given("mode") == "bm25":
        refuse(["model_path"], "--bm25 needs no model")
    if not given("output"):
        refuse(["overwrite"], "--overwrite is for --output")
    if given("forget"):
        refuse(
            ["model_path", "strict", "ignore_identical_ids", "dtype", "compile", "dequantize"],
            "--forget needs no model and no questions",
        )
    if Path(given("queries") or "").is_file():
        refuse(["strict", "ignore_identical_ids"], "--strict and --ignore-identical-ids are for folders in BEIR layout")
