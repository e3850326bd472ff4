"""A cross-encoder from real weights on real data, against sentence-transformers: all-MiniLM-L6-v2 on MedQuAD.

    pip install -r benchmarks/requirements.txt
    python benchmarks/rerank_medquad.py --data ../shared/data/medquad               # 40 minutes on 2 cores
    python benchmarks/rerank_medquad.py --data ../shared/data/medquad --only ours

Rows get 4 negatives each, drawn from the first 50 that BM25 finds among the training documents: with its first four,
all about the query's own disease, nothing would be learned of the others. Both sides start from the same weights with
a fresh head, take the same batches in the same order with the same learning rate, schedule, decay and clipping, and no
dropout; the peer is CrossEncoderTrainer with BinaryCrossEntropyLoss. Both rerank BM25's first 50 of the test folder.
Prints nDCG@10 before and after with intervals, and wall times. Figures in benchmarks/README.md.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from sides import minilm

import train
from mlx_retrieval import backend
from mlx_retrieval.dataset.rows import Rows, find_files
from mlx_retrieval.evaluation.reranking import evaluate_reranker
from mlx_retrieval.evaluation.results import Evaluation, compare
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.retrieval.bm25 import bm25
from mlx_retrieval.training import config
from mlx_retrieval.training import run as training_run
from mlx_retrieval.utils.console import print_lines, print_rows

backend.prepare()  # as commands do

NEGATIVES, DEPTH = 4, 50


def mine(source: Path, count: int, target: Path) -> None:
    """Write `count` random rows of `source`, each with documents among BM25's first that are no answer to its query."""
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


class Peer:
    """A CrossEncoder under the names that evaluation wants."""

    name = "sentence-transformers"

    def __init__(self, model):
        self.model = model

    def score_groups(self, groups) -> list[np.ndarray]:
        pairs = [(query, document) for query, documents in groups for document in documents]
        scores = self.model.predict(pairs, batch_size=32, show_progress_bar=False)
        return np.split(scores, np.cumsum([len(documents) for _, documents in groups])[:-1])


def train_peer(settings: config.Settings, batches: list[list[tuple[str, str, float]]]):
    """(the peer's model after the same batches, its wall seconds)."""
    import torch
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    from torch.utils.data import BatchSampler, SequentialSampler

    torch.manual_seed(settings.seed)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    limits = {"model_max_length": settings.max_length}
    model = CrossEncoder(settings.model, num_labels=1, device="cpu", config_kwargs=still, processor_kwargs=limits)
    pairs = [pair for batch in batches for pair in batch]
    columns = dict(zip(("query", "document", "label"), map(list, zip(*pairs, strict=True)), strict=True))
    arguments = CrossEncoderTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=len(batches[0]),
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        batch_sampler=lambda dataset, batch_size, drop_last, **_: BatchSampler(
            SequentialSampler(dataset), batch_size, drop_last
        ),
        save_strategy="no",
        report_to=[],
        logging_steps=10,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = CrossEncoderTrainer(model, arguments, Dataset.from_dict(columns), loss=BinaryCrossEntropyLoss(model))
    began = time.perf_counter()
    trainer.train()
    return model, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl and test/")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8, help="queries of a step, each with 5 documents")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-length", type=int, default=64, help="tokens of query and document together")
    parser.add_argument("--only", choices=("ours", "peer"))
    args = parser.parse_args()

    work = Path(tempfile.mkdtemp())
    mine(Path(args.data) / "train.jsonl", args.steps * args.batch_size, work / "mined.jsonl")
    test = [str(Path(args.data) / "test")]
    settings = config.Settings(
        model=minilm(), task="rerank", data=[str(work / "mined.jsonl")], batch_size=args.batch_size, steps=args.steps,
        learning_rate=args.learning_rate, max_length=args.max_length, train_type="full", eval_tasks=[], save_steps=0,
        output=str(work / "run"),
    )  # fmt: skip
    print_lines([("device", backend.describe()), ("mined", f"{args.steps * args.batch_size:,} queries by BM25")])
    results: dict[str, Evaluation] = {}
    seconds: dict[str, tuple[float, float]] = {}

    def evaluate(name: str, reranker, trained: float) -> None:
        began = time.perf_counter()
        results["BM25"], results[name] = evaluate_reranker(reranker, test, depth=DEPTH)
        seconds[name] = trained, time.perf_counter() - began
        found, score = (results[key].average()["ndcg_at_10"] for key in ("BM25", name))
        times = f"training {trained:.0f} s, evaluation {seconds[name][1]:.0f} s"
        print_lines([(name, f"nDCG@10 {score:.4f} (BM25 {found:.4f}), {times}")])

    if args.only != "peer":
        began = time.perf_counter()
        train.train(settings)
        trained = time.perf_counter() - began
        evaluate("ours", Reranker(str(work / "run" / "final")), trained)
    if args.only != "ours":
        run = training_run.prepare(config.Settings(**settings.to_dict() | {"dry_run": True, "loss": None}))
        batches = []
        for k in range(args.steps):
            examples = [run.trainer.batches.rows[i] for i in run.trainer.batches.row_numbers(k)]
            groups = [(e.query, [e.positive, *e.negatives]) for e in examples]
            batches.append([(q, d, float(i == 0)) for q, documents in groups for i, d in enumerate(documents)])
        settings.resolve_defaults(1)
        model, trained = train_peer(settings, batches)
        evaluate("sentence-transformers", Peer(model), trained)

    rows = []
    for name, result in results.items():
        score = f"{result.average()['ndcg_at_10']:.4f}"
        if name == "BM25":
            rows.append((name, score, "", "", "", ""))
            continue
        (_, _, _, change, low, high), *_ = compare(results["BM25"], result)
        times = (f"{value:.0f}" for value in seconds[name])
        rows.append((name, score, f"{change:+.4f}", f"[{low:+.4f}, {high:+.4f}]", *times))
    columns = ("what", "nDCG@10", "to BM25", "95 % interval", "training s", "evaluation s")
    print_rows(f"MedQuAD test, BM25's first {DEPTH} reranked", columns, rows)


if __name__ == "__main__":
    main()
