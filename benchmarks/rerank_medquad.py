"""A cross-encoder from real weights on real data, against sentence-transformers: all-MiniLM-L6-v2 on MedQuAD.

    pip install -r benchmarks/requirements.txt
    python benchmarks/rerank_medquad.py --data ../shared/data/medquad --keep runs       # 100 minutes on 2 cores
    python benchmarks/rerank_medquad.py --data ../shared/data/medquad --split dev --only ours --steps 100 --seeds 1

Rows get 4 negatives each, drawn from the first 50 that BM25 finds among the training documents: with its first four,
all about the query's own disease, nothing would be learned of the others. Both sides start from the same weights with
a fresh head, take the same batches in the same order with the same learning rate, schedule, decay and clipping, and no
dropout; the peer is CrossEncoderTrainer. Each side has its own losses. Both rerank BM25's first 50 of the test folder.
Seeds change the order of rows and the head's first weights; every run is a process of its own. Prints nDCG@10 of each
side, its range, its difference to the peer's first loss with the interval over queries and seeds, and wall times.
Figures in benchmarks/README.md.
"""

import argparse
import json
import shlex
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sides

NEGATIVES, DEPTH = 4, 50
PAIRWISE = "BinaryCrossEntropyLoss"  # the peer's loss of single pairs; its others take a query's documents together


class Outcome(NamedTuple):
    """The results of a run."""

    first_stage: Any  # evaluation of BM25's own order
    evaluation: Any
    training: float  # seconds
    reranking: float  # seconds

    @property
    def score(self) -> float:
        return self.evaluation.average()["ndcg_at_10"]


def mine(source: Path, count: int, target: Path) -> None:
    """Write `count` random rows of `source`, each with documents among BM25's first that are no answer to its query."""
    from mlx_retrieval.dataset.rows import Rows, find_files
    from mlx_retrieval.retrieval.bm25 import bm25

    rows = Rows(find_files([str(source)]))
    examples = [rows[i] for i in range(len(rows))]
    answers: dict[str, set[str]] = {}
    for example in examples:
        answers.setdefault(example.query, set()).add(example.positive)
    texts = list(dict.fromkeys(example.positive for example in examples))
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(examples))[:count].tolist()
    queries = {f"{i:06}": examples[i].query for i in chosen}
    found = bm25({f"{i:06}": text for i, text in enumerate(texts)}, queries, DEPTH)
    with open(target, "w", encoding="utf-8") as file:
        for i in chosen:
            query, positive = examples[i].query, examples[i].positive
            wrong = [texts[int(name)] for name in found[f"{i:06}"] if texts[int(name)] not in answers[query]]
            negatives = [wrong[j] for j in rng.permutation(len(wrong))[:NEGATIVES]]
            file.write(json.dumps({"query": query, "positive": positive, "negatives": negatives}) + "\n")


def settings_of(args: argparse.Namespace, rows: str, seed: int, output: str, loss: str | None = None):
    """Return our settings of a run, in which `args.ours` has the last word."""
    from mlx_retrieval.training.flags import from_flags

    flags = [
        *("--model", sides.minilm(), "--task", "rerank", "--data", rows, "--eval-tasks", "--output", output),
        *("--batch-size", args.batch_size, "--steps", args.steps, "--learning-rate", args.learning_rate),
        *("--max-length", args.max_length, "--train-type", "full", "--save-steps", 0, "--seed", seed),
        *(("--loss", loss) if loss else ()),
    ]
    settings, _ = from_flags("", "", [*map(str, flags), *shlex.split(args.ours)])
    return settings


def evaluated(args: argparse.Namespace, reranker, trained: float) -> Outcome:
    from mlx_retrieval.evaluation.reranking import evaluate_reranker

    began = time.perf_counter()
    first, second = evaluate_reranker(reranker, [str(Path(args.data) / args.split)], depth=DEPTH)
    return Outcome(first, second, trained, time.perf_counter() - began)


def our_side(args: argparse.Namespace, rows: str, loss: str, seed: int) -> Outcome:
    from mlx_retrieval import backend

    backend.prepare()  # as commands do

    import train
    from mlx_retrieval.inference.reranker import Reranker

    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(args, rows, seed, f"{folder}/run", loss)
        began = time.perf_counter()
        train.train(settings)
        return evaluated(args, Reranker(f"{folder}/run/final", raw_scores=True), time.perf_counter() - began)


# --- sentence-transformers ----------------------------------------------------------------------------------------


class Peer:
    """A CrossEncoder under the names that evaluation wants."""

    name = "sentence-transformers"

    def __init__(self, model):
        self.model = model

    def score_groups(self, groups) -> list[np.ndarray]:
        pairs = [(query, document) for query, documents in groups for document in documents]
        import torch

        scores = self.model.predict(pairs, batch_size=32, show_progress_bar=False, activation_fn=torch.nn.Identity())
        return np.split(scores, np.cumsum([len(documents) for _, documents in groups])[:-1])


def our_groups(args: argparse.Namespace, rows: str, seed: int) -> tuple[Any, list[tuple[str, list[str]]]]:
    """Return our resolved settings, and the queries with their documents, the answer first, in our batches' order."""
    from mlx_retrieval.training import run

    settings = settings_of(args, rows, seed, tempfile.mkdtemp() + "/run")
    settings.dry_run = True
    batches = run.prepare(settings).trainer.batches
    numbers = [i for k in range(args.steps) for i in batches.row_numbers(k)]
    return settings, [(e.query, [e.positive, *e.negatives]) for e in map(batches.rows.__getitem__, numbers)]


def columns_of(groups: list[tuple[str, list[str]]], as_pairs: bool) -> dict[str, list]:
    """Return queries, documents and labels: a row a pair, or a row a query with lists of its documents and labels."""
    if as_pairs:
        rows = [(query, text, float(i == 0)) for query, texts in groups for i, text in enumerate(texts)]
    else:
        rows = [(query, texts, [1.0] + [0.0] * (len(texts) - 1)) for query, texts in groups]
    return dict(zip(("query", "document", "label"), map(list, zip(*rows, strict=True)), strict=True))


def peer_side(args: argparse.Namespace, rows: str, loss: str, seed: int) -> Outcome:
    from mlx_retrieval import backend

    backend.prepare()

    import torch
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments, losses
    from torch.utils.data import BatchSampler, SequentialSampler

    settings, groups = our_groups(args, rows, seed)
    columns = columns_of(groups, loss == PAIRWISE)
    torch.manual_seed(seed)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    limits = {"model_max_length": settings.max_length}
    model = CrossEncoder(settings.model, num_labels=1, device="cpu", config_kwargs=still, processor_kwargs=limits)
    with tempfile.TemporaryDirectory() as folder:
        arguments = CrossEncoderTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=args.batch_size * (1 + NEGATIVES if loss == PAIRWISE else 1),
            max_steps=settings.steps,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.schedule,
            warmup_steps=settings.warmup_steps,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            batch_sampler=lambda dataset, batch_size, drop_last, **_: BatchSampler(
                SequentialSampler(dataset), batch_size, drop_last
            ),
            seed=seed,
            save_strategy="no",
            report_to=[],
            logging_steps=10,
            use_cpu=True,
            disable_tqdm=True,
        )
        function = getattr(losses, loss)(model)
        trainer = CrossEncoderTrainer(model, arguments, Dataset.from_dict(columns), loss=function)
        began = time.perf_counter()
        trainer.train()
    return evaluated(args, Peer(model), time.perf_counter() - began)


# --- both ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl, dev/ and test/")
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="rerank this (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8, help="queries of a step, each with 5 documents")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-length", type=int, default=64, help="tokens of query and document together")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--loss", nargs="+", default=["list_bce"], help="of ours, a run a seed for each")
    parser.add_argument("--ours", default="", metavar="FLAGS", help="further flags of train.py")
    parser.add_argument("--peer-loss", nargs="+", default=[PAIRWISE], help="of the peer, a run a seed for each")
    parser.add_argument("--only", choices=("ours", "peer"))
    parser.add_argument("--keep", metavar="FOLDER", help="keep finished runs here, and repeat none that is there")
    args = parser.parse_args()

    print(sides.machine(), flush=True)

    from seeds import cells, difference, kept

    from mlx_retrieval.utils.console import print_rows
    from mlx_retrieval.utils.text import quantity

    runs = [("ours", name, our_side) for name in args.loss if args.only != "peer"]
    runs += [("peer", name, peer_side) for name in args.peer_loss if args.only != "ours"]
    outcomes: dict[str, list[Outcome]] = {f"{side}, {loss}": [] for side, loss, _ in runs}
    with tempfile.TemporaryDirectory() as folder:
        rows = f"{folder}/mined.jsonl"
        mine(Path(args.data) / "train.jsonl", args.steps * args.batch_size, Path(rows))
        for seed in range(args.seeds):
            for side, loss, function in runs:
                data = str(Path(args.data).resolve())
                common = (data, args.split, args.steps, args.batch_size, args.learning_rate, args.max_length)
                settings, name = repr((*common, args.ours if side == "ours" else "")), f"{side}-{loss}-{seed}"
                task = (function, args, rows, loss, seed)
                outcome = Outcome(*kept(args.keep, name, settings, lambda: sides.in_child(*task)))  # noqa: B023
                outcomes[f"{side}, {loss}"].append(outcome)
                times = f"training {outcome.training:.0f} s, reranking {outcome.reranking:.0f} s"
                print(f"{side}, {loss}, seed {seed}: nDCG@10 {outcome.score:.4f}, {times}", flush=True)

    first_stage = next(iter(outcomes.values()))[0].first_stage
    reference = next((name for name in outcomes if name.startswith("peer")), "BM25")
    results = {"BM25": [first_stage]} | {name: [o.evaluation for o in side] for name, side in outcomes.items()}
    table = []
    for name, evaluations in results.items():
        scores = [evaluation.average()["ndcg_at_10"] for evaluation in evaluations]
        score, *change = cells(statistics.fmean(scores), difference(results[reference], evaluations))
        row = (score, f"{min(scores):.4f} - {max(scores):.4f}", *(change if name != reference else ("", "")))
        times = [(outcome.training, outcome.reranking) for outcome in outcomes.get(name, [])]
        seconds = [f"{statistics.median(column):.0f}" for column in zip(*times, strict=True)]
        table.append((name, *row, *(seconds or ("", ""))))
    to = "to BM25" if reference == "BM25" else "to the peer"
    columns = ("what", "nDCG@10", "least - most", to, "95 % interval", "training s", "reranking s")
    print_rows(f"MedQuAD {args.split}, BM25's first {DEPTH} reranked; {quantity(args.seeds, 'seed')}", columns, table)


if __name__ == "__main__":
    main()
