"""Evaluate a retrieval model: an adapter on its base, a base model, or an exported folder.

python eval.py --model adapters/final                                        # on the folder eval-data/
python eval.py --model MODEL --eval-tasks eval-data NanoMSMARCORetrieval --output results.json
python eval.py --model adapters/final --precision float32 int8 binary --dimensions 384 128     # what compression costs
python eval.py --task rerank --model MODEL --first-stage bm25 --depth 100                      # a reranker
python eval.py --task rerank --model MODEL --first-stage hybrid:adapters/final          # by words and meaning
python eval.py --compare adapters/one/best adapters/two/best --eval-tasks my-eval              # which one is better
python eval.py --model adapters/final --eval-tasks NanoBEIR STS12 --results mteb         # as mteb keeps and reads it

A task is a folder in BEIR layout (corpus.jsonl, queries.jsonl, qrels/test.tsv), the name of an MTEB task of type
Retrieval or STS, or a file of scored pairs. STS and pairs are judged by Spearman's correlation of cosines and scores.
MTEB's tasks are searched and scored by mteb. A folder is evaluated without importing mteb, which would take seconds.
The figures are the same: every document is compared with every query, and pytrec_eval, which mteb uses, computes the
metrics. Nothing is cached on disk. Training calls `evaluate` every N steps; this command prints the same figures, to
the last digit, for the saved model.

With --results, mteb alone evaluates its tasks of every type and its benchmarks, and leaves its own folder of results.

from eval import evaluate
from embed import load
evaluation = evaluate(load("adapters/final"), ["eval-data"])       # .tasks, .per_query, .average()
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_retrieval.backend import device_errors

from mlx_retrieval import backend
from mlx_retrieval.dataset import beir
from mlx_retrieval.evaluation import comparison, pairs
from mlx_retrieval.evaluation.first_stages import HYBRID, model_of, open_stage
from mlx_retrieval.evaluation.reranking import DEPTH, check_depth, evaluate_reranker, print_reranked
from mlx_retrieval.evaluation.results import Evaluation, compare, compare_formats, print_formats, print_table
from mlx_retrieval.evaluation.retrieval import evaluate, evaluate_formats, vector_formats
from mlx_retrieval.inference.quantization import PRECISIONS
from mlx_retrieval.retrieval.analyzer import ENGLISH
from mlx_retrieval.utils import files, imports
from mlx_retrieval.utils.command import COMPILE_HELP, DEQUANTIZE_HELP, DTYPE_HELP, Parser, command, user_path
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.outputs import check_output

__all__ = ["Evaluation", "compare", "evaluate", "evaluate_reranker"]


def rules_of(args: argparse.Namespace) -> beir.FolderRules:
    """Return the rules that the flags set."""
    return beir.FolderRules(args.strict, args.ignore_identical_ids)


def evaluate_encoder(args: argparse.Namespace, show_progress: bool) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluate an embedding or late-interaction model and print the tables. Return figures and `--output`'s JSON."""
    from mlx_retrieval.inference import dtypes
    from mlx_retrieval.inference.embedder import load

    settings: dict[str, Any] = {"max_length": args.max_length, "query_max_length": args.query_max_length}
    settings |= {"dtype": args.dtype} | ({"task": args.task} if args.task else {})
    settings |= {"truncate_dim": 0} if args.dimensions else {}  # the flag wins over the model's files
    model, stored = load(args.model, args.adapter, **settings), {}
    dtypes.report(model)
    if args.precision or args.dimensions:
        formats = vector_formats(args.precision, args.dimensions, model.dimensions)
        evaluation, stored = evaluate_formats(model, args.eval_tasks, formats, show_progress, rules_of(args))
    else:
        evaluation = evaluate(model, args.eval_tasks, show_progress, rules_of(args))
    record = evaluation.to_json()
    if evaluation.tasks:
        print_table(evaluation)
    if stored and evaluation.tasks:
        record["stored"] = compare_formats(evaluation, stored)
        print_formats(record["stored"])
    return evaluation, record


def evaluate_as_mteb(args: argparse.Namespace, is_reranker: bool) -> int:
    """Evaluate a model on mteb's tasks, leave the results as mteb keeps them, and print their table. Return 0 or 1."""
    from mlx_retrieval.evaluation import mteb_results, mteb_selection

    tasks = mteb_selection.select(args.eval_tasks, args.languages or (), args.task_types or ())
    prompts = mteb_selection.read_prompts(Path(args.task_prompts), tasks) if args.task_prompts else {}
    # After mteb: it brings torch, which transformers looks for only once.
    from mlx_retrieval.inference import dtypes, embedder, reranker

    settings = {"max_length": args.max_length, "query_max_length": args.query_max_length, "dtype": args.dtype}
    settings = {name: value for name, value in settings.items() if value is not None}
    if is_reranker:
        model = reranker.Reranker(args.model, args.adapter, raw_scores=True, **settings)
    else:
        task = {"task": args.task} if args.task else {}
        model = embedder.load(args.model, args.adapter, **settings, **task)
    dtypes.report(model)
    folder = Path(args.results)
    run = mteb_results.evaluate(model, tasks, folder, args.results_name, prompts, settings, args.overwrite)
    for reason in run.unreachable.values():
        print(f"eval.py: {reason}", file=sys.stderr)
    if not run.scores:
        return 2
    mteb_results.print_table(run)
    print(f"results in {run.folder}", file=sys.stderr)
    return 1 if run.unreachable else 0


def evaluate_rerank(args: argparse.Namespace, show_progress: bool) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluate a reranker and print the tables. Return the figures after reranking and `--output`'s JSON."""
    from mlx_retrieval.inference import dtypes
    from mlx_retrieval.inference.reranker import Reranker

    first_stage = open_stage(args.first_stage, args.dtype, args.language or ENGLISH)
    # By logits: large ones have the same sigmoid in float32, and would tie.
    reranker = Reranker(args.model, args.adapter, max_length=args.max_length, raw_scores=True, dtype=args.dtype)
    dtypes.report(*model_of(first_stage), reranker)
    depth = args.depth or DEPTH
    before, after = evaluate_reranker(reranker, args.eval_tasks, first_stage, depth, show_progress, rules_of(args))
    record = after.to_json() | {"first_stage": {"model": before.model, "depth": depth, "tasks": before.tasks}}
    if after.tasks:
        print_reranked(before, after, depth)
        record["differences"] = {
            metric: {"difference": difference, "low": low, "high": high}
            for metric, _, _, difference, low, high in compare(before, after)
        }
    return after, record


def evaluate_compared(args: argparse.Namespace, show_progress: bool) -> tuple[Evaluation, dict[str, Any]]:
    """Compare models and files of results, and print the tables. Return the first's figures and `--output`'s JSON."""
    names = args.compare
    how = args.first_stage, args.depth, show_progress, rules_of(args), args.dtype, args.language
    evaluations = comparison.evaluations_of(names, args.eval_tasks, *how)
    if not evaluations[0].tasks:  # no task could be reached
        return evaluations[0], {}
    comparisons = comparison.compare_with_first(names, evaluations)
    comparison.print_comparisons(names, evaluations, comparisons)
    return evaluations[0], comparison.to_json(names, evaluations, comparisons)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    what = "Evaluate a retrieval model on folders, files of scored pairs and MTEB tasks."
    out = Parser(prog="eval.py", description=what)
    model = "adapter folder, base model's folder or GGUF, or hub name"
    subject = out.add_mutually_exclusive_group(required=True)
    subject.add_argument("--model", "--model-path", type=user_path, metavar="MODEL", help=model)
    compared = (
        "compare models of any task, and files that --output wrote, with the first of them: paired 95 %% intervals and "
        "a verdict for each, by nDCG@10 or Spearman"
    )
    subject.add_argument("--compare", nargs="+", type=user_path, metavar="MODEL", help=compared)
    out.add_argument(
        "--adapter", type=user_path, metavar="DIR", help="adapter folder to load on top of the base model --model"
    )
    kinds = (
        "embed: one vector a text; late: one vector a token; rerank: one score a pair "
        "(default: as the model's files say; of a language model, its name)"
    )
    out.add_argument("--task", choices=("embed", "late", "rerank"), help=kinds)
    tasks = (
        "folders in BEIR layout, files of scored pairs, and MTEB tasks, Retrieval or STS (default: eval-data); "
        "with --results: tasks of any type and benchmarks of mteb, or mock"
    )
    out.add_argument("--eval-tasks", nargs="+", type=user_path, metavar="TASK", help=tasks)
    strict = "refuse untidy folders: judgements that contradict each other, or of texts that are missing; null texts"
    out.add_argument("--strict", action="store_true", help=strict)
    identical = "leave out of a query's results the document that has its id, as BEIR does"
    out.add_argument("--ignore-identical-ids", action="store_true", help=identical)
    output = "also write the figures to this file, as JSON, with the scores and the first 10 documents of each query"
    out.add_argument("--output", type=user_path, metavar="FILE", help=output)
    out.add_argument(
        "--overwrite", action="store_true", help="replace --output if it exists; evaluate what --results holds again"
    )
    longest = "truncate documents to N tokens; rerank: query and document together (default: the model's own limit)"
    out.add_argument("--max-length", type=int, metavar="N", help=longest)
    shorter = "truncate queries to N tokens; not for rerank (default: the model's own limit)"
    out.add_argument("--query-max-length", type=int, metavar="N", help=shorter)
    out.add_argument("--dtype", choices=backend.DTYPES, help=DTYPE_HELP)
    out.add_argument("--compile", choices=backend.COMPILE, default="auto", help=COMPILE_HELP)
    out.add_argument("--dequantize", choices=backend.DEQUANTIZE, default="auto", help=DEQUANTIZE_HELP)
    as_mteb = out.add_argument_group("results as mteb keeps them")
    results = (
        "evaluate through mteb alone, and leave results in DIR/results/MODEL/REVISION, for its ResultCache(DIR); "
        "tasks whose results are there are not evaluated again"
    )
    as_mteb.add_argument("--results", type=user_path, metavar="DIR", help=results)
    called = "the model's name in --results (default: its hub name, or the names of its last two folders)"
    as_mteb.add_argument("--results-name", metavar="ORGANISATION/NAME", help=called)
    types = "of --eval-tasks, only tasks of these types, such as Retrieval or STS"
    as_mteb.add_argument("--task-types", nargs="+", metavar="TYPE", help=types)
    languages = "of --eval-tasks, only tasks and subsets in one of these, such as eng or deu-Latn"
    as_mteb.add_argument("--languages", nargs="+", metavar="CODE", help=languages)
    prompts = (
        'JSON file of prompts by task, type of task, "query" or "document", or two of them such as "Retrieval-query"; '
        "they come before the model's own"
    )
    as_mteb.add_argument("--task-prompts", type=user_path, metavar="FILE", help=prompts)
    vectors = out.add_argument_group("stored vectors (--task embed)")
    precisions = (
        "also evaluate vectors stored at these precisions, without embedding again; int8 and uint8: ranges from the "
        "corpus, queries stay float32; binary and ubinary: once with queries that are bits too, by Hamming distance, "
        "once with float32 queries"
    )
    vectors.add_argument("--precision", nargs="+", choices=PRECISIONS, help=precisions)
    dimensions = "also evaluate vectors truncated to N dimensions (Matryoshka), at every --precision"
    vectors.add_argument("--dimensions", nargs="+", type=int, metavar="N", help=dimensions)
    rerank = out.add_argument_group("rerankers (--task rerank)")
    stage = (
        "what finds the documents: bm25, a model of --task embed or late, or both together, hybrid:MODEL "
        "(default: bm25)"
    )
    rerank.add_argument("--first-stage", type=user_path, metavar="MODEL", help=stage)
    spoken = "language of BM25's stems and stop words, such as german, or none (default: english)"
    rerank.add_argument("--language", metavar="NAME", help=spoken)
    depth = f"documents of a query that are reranked (default: {DEPTH})"
    rerank.add_argument("--depth", "--rerank-depth", type=int, metavar="N", help=depth)
    return out


def task_of(args: argparse.Namespace) -> str | None:
    """Return the task: that of the flag, rerank for a reranker, or None for any other model."""
    from mlx_retrieval.models.kinds import detect_kind

    return args.task or ("rerank" if detect_kind(args.model, args.adapter) == "rerank" else None)


def check_task(args: argparse.Namespace, task: str | None) -> None:
    """Raise UserError for flags that do not fit the task."""
    is_rerank = task == "rerank"
    unfit = ("precision", "dimensions", "query_max_length") if is_rerank else ("first_stage", "depth", "language")
    kind = "" if args.task else f", and {args.model} is {'one' if is_rerank else 'no reranker'}"
    refuse(args, unfit, f"{'not' if is_rerank else 'only'} for --task rerank{kind}")


def refuse(args: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    """Raise UserError if one of these flags is given."""
    if flags := [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, False)]:
        raise UserError(f"{' and '.join(flags)}: {reason}")


def check_flags(args: argparse.Namespace) -> Path | None:
    """Return the path of `--output`. Raises UserError for flags that do not fit, and for wrong values."""
    if args.compare:
        unfit = ("adapter", "task", "max_length", "query_max_length", "precision", "dimensions")
        refuse(args, unfit, "not with --compare; evaluate with --output and compare the files")
    elif args.task:
        check_task(args, args.task)
    if args.results:
        return check_results(args)
    refuse(args, ("results_name", "task_types", "languages", "task_prompts"), "only with --results")
    if not args.output:
        refuse(args, ("overwrite",), "only with --output or --results")
    if args.depth is not None:
        check_depth(args.depth)
    output = Path(args.output) if args.output else None
    if not args.compare:
        args.eval_tasks = args.eval_tasks or ["eval-data"]
    first_stage = (args.first_stage or "").removeprefix(f"{HYBRID}:") or None
    inputs = (args.model, args.adapter, first_stage, *(args.compare or ()), *(args.eval_tasks or ()))
    if output:
        check_output(output, args.overwrite, inputs)
    if not args.compare:
        pairs.check_tasks(args.eval_tasks, rules_of(args))
    return output


def check_results(args: argparse.Namespace) -> None:
    """Raise UserError for flags that do not fit --results, and for wrong values."""
    unfit = ("output", "strict", "ignore_identical_ids", "precision", "dimensions", "first_stage", "depth", "language")
    refuse(args, ("compare", *unfit), "not with --results, where mteb evaluates")
    if not args.eval_tasks:
        raise UserError("--results: name tasks or benchmarks of mteb by --eval-tasks")
    if args.results_name and len([part for part in args.results_name.split("/") if part]) != 2:
        raise UserError(f"--results-name {args.results_name}: mteb's names of models are ORGANISATION/NAME")
    if (folder := Path(args.results)).exists() and not folder.is_dir():
        raise UserError(f"--results {args.results}: this is a file, not a folder")
    for file in [Path(args.task_prompts)] if args.task_prompts else []:
        if not file.is_file():
            raise UserError(f"--task-prompts {args.task_prompts}: {'not a file' if file.exists() else 'no such file'}")


@command("eval.py", explain=device_errors.explain)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, 1 if some tasks were unreachable, or 2 for an error or no task at all."""
    backend.prepare()
    args = parser().parse_args(argv)
    backend.set_compile(args.compile)
    backend.set_dequantize(args.dequantize)
    output = check_flags(args)
    run = evaluate_compared
    if not args.compare:
        task = task_of(args)
        check_task(args, task)
        run = evaluate_rerank if task == "rerank" else evaluate_encoder
    print(backend.describe(), file=sys.stderr)
    if args.results:
        return evaluate_as_mteb(args, task == "rerank")
    evaluation, record = run(args, sys.stderr.isatty())
    for reason in evaluation.unreachable.values():
        print(f"eval.py: {reason}", file=sys.stderr)
    if output:
        files.write_file(output, json.dumps(record, indent=2) + "\n", f"--output {output}")
    return 2 if not evaluation.tasks else 1 if evaluation.unreachable else 0


if __name__ == "__main__":
    imports.hide("torch", "wandb")
    sys.exit(main())
