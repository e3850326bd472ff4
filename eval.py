"""Evaluate a retrieval model: an adapter on its base, a base model, or an exported folder.

python eval.py --model adapters/final                                        # on the folder eval-data/
python eval.py --model MODEL --eval-tasks eval-data NanoMSMARCORetrieval --output results.json
python eval.py --model adapters/final --precision float32 int8 binary --dimensions 384 128     # what storing costs
python eval.py --task rerank --model MODEL --first-stage bm25 --depth 100                           # a reranker

A task is a folder in BEIR layout (corpus.jsonl, queries.jsonl, qrels/test.tsv) or the name of an MTEB retrieval task.
MTEB's tasks are searched and scored by mteb. A folder does without importing it, which takes seconds, and gets the same
figures: every document is compared with every query, and pytrec_eval, which mteb takes, computes the metrics. Nothing
is cached. Training calls `evaluate` every N steps with the model it trains and gets, to the last digit, what this
command says about the saved model.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_retrieval import backend
from mlx_retrieval.dataset import beir
from mlx_retrieval.evaluation.reranking import DEPTH, check_depth, evaluate_reranker, print_reranked
from mlx_retrieval.evaluation.results import (
    Evaluation,
    compare,
    compare_stored,
    print_stored,
    print_table,
)
from mlx_retrieval.evaluation.retrieval import evaluate, evaluate_stored, forms_of
from mlx_retrieval.inference.quantization import PRECISIONS
from mlx_retrieval.utils import imports
from mlx_retrieval.utils.errors import UserError


def _evaluate_flags(args: argparse.Namespace, show_progress: bool) -> tuple[Evaluation, dict[str, Any]]:
    """What the flags ask for, its tables printed: the figures, and what `--output` writes."""
    from mlx_retrieval.inference.embedder import load

    settings: dict[str, Any] = {"max_length": args.max_length, "query_max_length": args.query_max_length}
    settings |= {"task": args.task} if args.task else {}
    model, stored = load(args.model, args.adapter, **settings), {}
    if args.precision or args.dimensions:
        forms = forms_of(args.precision, args.dimensions, model.dimensions)
        result, stored = evaluate_stored(model, args.eval_tasks, forms, show_progress)
    else:
        result = evaluate(model, args.eval_tasks, show_progress=show_progress)
    record = result.to_json()
    if result.tasks:
        print_table(result)
    if stored and result.tasks:
        record["stored"] = compare_stored(result, stored)
        print_stored(record["stored"])
    return result, record


def main(argv: Sequence[str] | None = None) -> int:
    backend.prepare()
    parser = argparse.ArgumentParser(description="Evaluate a retrieval model on folders and on MTEB retrieval tasks.")
    parser.add_argument("--model", required=True, help="adapter folder, base model's folder, or hub name")
    parser.add_argument("--adapter", help="adapter folder to put on the base model --model")
    tasks = "folders in BEIR layout and names of MTEB tasks (default: eval-data)"
    parser.add_argument("--eval-tasks", nargs="+", default=["eval-data"], metavar="TASK", help=tasks)
    parser.add_argument("--output", metavar="FILE", help="write the figures to this file, as JSON")
    longest = "cut documents (rerank: query and document together) after N tokens"
    parser.add_argument("--max-length", type=int, metavar="N", help=longest)
    parser.add_argument("--query-max-length", type=int, metavar="N", help="cut queries after N tokens")
    precisions = (
        "also evaluate vectors stored so, from the same embeddings; int8 and uint8: ranges from the corpus, queries "
        "stay float32; binary and ubinary: both sides are bits, compared by Hamming distance"
    )
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help=precisions)
    shorter = "also evaluate vectors cut to N dimensions (Matryoshka), in every --precision"
    parser.add_argument("--dimensions", nargs="+", type=int, metavar="N", help=shorter)
    add_flags(parser)
    args = parser.parse_args(argv)
    try:
        check_flags(args)
        output = Path(args.output).expanduser() if args.output else None
        if output and (output.is_dir() or not output.parent.is_dir()):
            raise UserError(f"--output {output}: not a file in a folder that exists")
        beir.check_folders(args.eval_tasks)
        print(backend.describe(), file=sys.stderr)
        run = evaluate_flags if args.task == "rerank" else _evaluate_flags
        result, record = run(args, sys.stderr.isatty())
        for why_not in result.unreachable.values():
            print(f"eval.py: {why_not}", file=sys.stderr)
        if output:
            output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except (UserError, FloatingPointError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    return 2 if not result.tasks else 1 if result.unreachable else 0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --task and the flags of --task rerank."""
    kinds = "embed: a vector a text; late: a vector a token; rerank: a score a pair (default: embed or late, as saved)"
    parser.add_argument("--task", choices=("embed", "late", "rerank"), help=kinds)
    stage = "rerank: what finds the documents, bm25 or a model of --task embed or late (default: bm25)"
    parser.add_argument("--first-stage", metavar="MODEL", help=stage)
    depth = f"rerank: how many of the documents found for a query are reranked (default: {DEPTH})"
    parser.add_argument("--depth", type=int, metavar="N", help=depth)


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for flags that do not fit --task."""
    rerank = args.task == "rerank"
    unfit = ("precision", "dimensions", "query_max_length") if rerank else ("first_stage", "depth")
    if given := [f"--{name.replace('_', '-')}" for name in unfit if getattr(args, name) is not None]:
        raise UserError(f"{' and '.join(given)}: {'not' if rerank else 'only'} for --task rerank")
    if args.depth is not None:
        check_depth(args.depth)


def evaluate_flags(args: argparse.Namespace, show_progress: bool) -> tuple[Evaluation, dict[str, Any]]:
    """What the flags ask for, its tables printed: the reranked figures, and what `--output` writes."""
    from mlx_retrieval.inference.reranker import Reranker

    first: Any = "bm25"
    if args.first_stage not in (None, "bm25"):
        from mlx_retrieval.inference.embedder import load

        first = load(args.first_stage)
    reranker = Reranker(args.model, args.adapter, max_length=args.max_length)
    depth = args.depth or DEPTH
    before, after = evaluate_reranker(reranker, args.eval_tasks, first, depth, show_progress)
    record = after.to_json() | {"first_stage": {"model": before.model, "depth": depth, "tasks": before.tasks}}
    if after.tasks:
        print_reranked(before, after, depth)
        record["differences"] = {
            metric: {"difference": difference, "low": low, "high": high}
            for metric, _, _, difference, low, high in compare(before, after)
        }
    return after, record


if __name__ == "__main__":
    imports.hide("torch", "wandb")
    sys.exit(main())
