"""Rank documents by how well they answer a query, with a model that reads both together; or serve such a model.

from rerank import Reranker
reranker = Reranker("Qwen/Qwen3-Reranker-0.6B", adapter="adapters/best")        # or a cross-encoder, listwise, late
reranker.rerank("where is Kyoto", documents, top_n=2)        # [{"index", "score", "document"}], best first
reranker.score("where is Kyoto", documents)                  # numpy float32, in the documents' order

python rerank.py --model adapters/best --query "where is Kyoto" --documents docs.jsonl --top-n 10
python rerank.py --check adapters/best                       # exit code 1 if a check fails
python rerank.py --model adapters/best --serve --port 8000   # /v1/rerank, and /v1/embeddings with --embedding-model
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_retrieval.backend import device_errors

from mlx_retrieval import backend
from mlx_retrieval.dataset.text_files import Text, read_text_rows
from mlx_retrieval.inference import dtypes
from mlx_retrieval.inference.finite import NonFiniteError
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.models.rerankers import KINDS
from mlx_retrieval.utils import imports
from mlx_retrieval.utils.command import COMPILE_HELP, DEQUANTIZE_HELP, DTYPE_HELP, Parser, command, user_path
from mlx_retrieval.utils.console import NARROWEST, console
from mlx_retrieval.utils.errors import Place, UserError
from mlx_retrieval.utils.text import quantity, writable

__all__ = ["Reranker"]

# Attributes of the flags that decide scores, whatever is to be done.
SCORING = (
    *("adapter", "reranker_type", "max_length", "instruction", "raw_scores"),
    *("dtype", "compile", "dequantize"),
)


def read_documents(path: Path, field: str | None) -> list[Text]:
    """Read the documents of a file; UserError if it holds none."""
    documents = list(read_text_rows(path, field))
    if not documents:
        raise UserError(f"{path}: contains no document")
    return documents


def print_results(results: Sequence[dict[str, Any]], count: int, name: str) -> None:
    """Print the ranking as a table: rank, score, number in the file, text."""
    from rich.text import Text

    console().print(Text(f"{name}: {quantity(count, 'document')}", style="bold"))
    for rank, result in enumerate(results, start=1):
        place = Text.assemble(f"{rank:>4}  {result['score']:.4f}  ", (f"#{result['index']:<6}", "dim"))
        text = Text(" ".join(result["document"].split()))
        if console().width - len(place) < NARROWEST:  # the text comes below, so that no figure is cut
            console().print(place)
            place = Text("      ")
        console().print(place + text, no_wrap=True, overflow="ellipsis")


def open_reranker(args: argparse.Namespace) -> Reranker:
    """Load the reranker that the flags name."""
    settings = (args.reranker_type, args.max_length, args.instruction, args.raw_scores, args.dtype)
    return Reranker(args.model, args.adapter, *settings)


def serve(args: argparse.Namespace) -> None:
    """Answer requests over HTTP until Ctrl-C."""
    from mlx_retrieval.inference import embedder
    from mlx_retrieval.inference.serving.app import ServerSettings
    from mlx_retrieval.inference.serving.run import run
    from mlx_retrieval.inference.serving.served_models import ServedModels

    key = os.environ.get("RERANK_API_KEY") or None
    reranker = open_reranker(args) if args.model else None
    model = embedder.load(args.embedding_model, dtype=args.dtype) if args.embedding_model else None
    dtypes.report(*(each for each in (reranker, model) if each is not None))
    settings = ServerSettings(keys=(key,) if key else ())
    run(ServedModels.of(reranker, model), settings, host=args.host, port=args.port)


def parser() -> Parser:
    """Return the parser of this command's flags."""
    out = Parser(
        prog="rerank.py", description="Rank documents for a query, or serve rerankers and embedding models over HTTP."
    )
    out.add_argument(
        "--model",
        "--model-path",
        type=user_path,
        metavar="MODEL",
        help="adapter folder, base model's folder or GGUF, or hub name",
    )
    out.add_argument(
        "--adapter", type=user_path, metavar="DIR", help="adapter folder to load on top of the base model --model"
    )
    out.add_argument(
        "--reranker-type", choices=KINDS, help="the kind of reranker (default: the kind that the model's files tell)"
    )
    out.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="most tokens of query and document together; longer documents are truncated (default: as the model was "
        "saved)",
    )
    out.add_argument(
        "--instruction",
        type=writable,
        metavar="TEXT",
        help="the instruction by which a qwen3 or listwise model judges (default: as the model was saved)",
    )
    out.add_argument(
        "--raw-scores",
        action="store_true",
        help="give logits, without the sigmoid that most rerankers' files ask for; the ranking is the same",
    )
    out.add_argument("--dtype", choices=backend.DTYPES, help=DTYPE_HELP)
    out.add_argument("--compile", choices=backend.COMPILE, default="auto", help=COMPILE_HELP)
    out.add_argument("--dequantize", choices=backend.DEQUANTIZE, default="auto", help=DEQUANTIZE_HELP)
    rank = out.add_argument_group("rank a file")
    rank.add_argument("--query", type=writable, metavar="TEXT", help="the query")
    rank.add_argument(
        "--documents",
        type=user_path,
        metavar="FILE",
        help='documents: JSON lines ("text", or "title" and "text", ...), or .txt with one a line',
    )
    rank.add_argument("--field", metavar="KEY", help="key of the text in JSON rows")
    rank.add_argument(
        "--top-n", "--top", type=int, default=10, metavar="N", help="print the best N documents (default: 10)"
    )
    rank.add_argument("--json", action="store_true", help="print one JSON object a line, with the full documents")
    server = out.add_argument_group("serve")
    server.add_argument("--serve", action="store_true", help="answer requests over HTTP; serve.py serves more models")
    server.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    server.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port to listen on; 0 = any free one (default: 8000)"
    )
    server.add_argument(
        "--embedding-model",
        type=user_path,
        metavar="MODEL",
        help="answer /v1/embeddings with this adapter or model; if RERANK_API_KEY is set, clients must send it",
    )
    out.add_argument(
        "--check",
        type=user_path,
        metavar="MODEL",
        help="rank nothing, but check whether this reranker is sound; exit code 1 if a check fails",
    )
    return out


def check_model(args: argparse.Namespace) -> int:
    """Print the findings of every check and a verdict; return 1 if a check fails, else 0."""
    from mlx_retrieval.inference import checks, reranker_checks

    args.model = args.check
    if failed := checks.report(args.check, reranker_checks.examine(open_reranker(args))):
        print(f"rerank.py: FAILED: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 0


@command("rerank.py", explain=device_errors.explain)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 if a check fails, 2 for a user's error, 130 after Ctrl-C."""
    backend.prepare()
    flags = parser()
    args = flags.parse_args(argv)
    backend.set_compile(args.compile)
    backend.set_dequantize(args.dequantize)
    check_flags(flags, args)
    if args.check is not None:
        return check_model(args)
    if args.serve:
        with suppress(KeyboardInterrupt):  # the way to end a server: no message
            serve(args)
        return 130
    documents = read_documents(Path(args.documents), args.field)
    reranker = open_reranker(args)
    dtypes.warn("rerank.py", reranker)
    try:
        results = reranker.rerank(args.query, [document.text for document in documents], args.top_n)
    except NonFiniteError as error:
        raise error.placed(lambda number: str(Place(args.documents, documents[number].line))) from error
    if args.json:
        print("\n".join(json.dumps(result, ensure_ascii=False) for result in results))
    else:
        print_results(results, len(documents), reranker.name)
    if reranker.cut:
        print(f"rerank.py: truncated {quantity(reranker.cut, 'document')} at the end (--max-length)", file=sys.stderr)
    return 0


def check_flags(flags: Parser, args: argparse.Namespace) -> None:
    """Exit if a flag is missing, or has no effect on what is to be done."""
    needed = {"--model": args.model, "--query": args.query, "--documents": args.documents}
    if args.check is not None:
        flags.take_only(args, ("check", *SCORING), "--check ranks nothing")
    elif args.serve:
        names = ("serve", "model", "embedding_model", "host", "port", *SCORING)
        flags.take_only(args, names, "--serve answers requests")
        if not (args.model or args.embedding_model):
            flags.error("--serve needs --model, --embedding-model or both")
    elif missing := [name for name, value in needed.items() if not value]:
        flags.error(f"the following arguments are required: {', '.join(missing)} (or --serve, or only --check MODEL)")
    else:
        names = ("host", "port", "embedding_model")
        flags.take_none(args, names, "--host, --port and --embedding-model are for --serve")


if __name__ == "__main__":
    imports.hide("torch", "wandb")
    sys.exit(main())
