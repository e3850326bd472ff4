"""A real decoder as a judge that answers yes or no: SmolLM2-135M-Instruct reranks BM25's first 50 of MedQuAD.

    pip install -r benchmarks/requirements.txt && python tools/fetch_smollm2.py
    python benchmarks/decoder_rerank.py --data ../shared/data/medquad        # some 20 minutes on 2 cores

The prompt is Qwen3-Reranker's, which SmolLM2 has never seen. The model reranks before training and after LoRA on rows
with 4 negatives, drawn from the first 50 that BM25 finds. The adapter is then exported, and CrossEncoder of
sentence-transformers reranks the same with that folder. Prints nDCG@10 of each, the interval of its difference to BM25,
seconds, and the largest difference between the probabilities of the two libraries; ends with an error where that is
more than 1e-3. Figures in benchmarks/README.md.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import sides
from rerank_medquad import DEPTH, Peer, mine

LARGEST_DIFFERENCE = 1e-3  # between probabilities of the two libraries


class Recorded:
    """A reranker that keeps the scores it has given."""

    def __init__(self, reranker: Any):
        self.reranker, self.name, self.scores = reranker, reranker.name, []

    def score_groups(self, groups) -> list[np.ndarray]:
        found = self.reranker.score_groups(groups)
        self.scores += found
        return found


def evaluated(reranker: Any, test: str) -> tuple[Any, Any, np.ndarray, float]:
    """Return the evaluations of BM25 and of the reranker, its scores, and the seconds that reranking took."""
    from mlx_retrieval.evaluation.reranking import evaluate_reranker

    recorded = Recorded(reranker)
    began = time.perf_counter()
    first, second = evaluate_reranker(recorded, [test], depth=DEPTH)
    return first, second, np.concatenate(recorded.scores), time.perf_counter() - began


def our_side(args: argparse.Namespace, model: str, rows: str, test: str, work: str) -> tuple[list, float]:
    """Rerank, train, rerank again and export; return both results, and the seconds of training."""
    from mlx_retrieval import backend

    backend.prepare()  # as commands do

    from mlx_retrieval.exporters.job import Export
    from mlx_retrieval.exporters.run import export
    from mlx_retrieval.inference.reranker import Reranker
    from mlx_retrieval.training.flags import from_flags
    from mlx_retrieval.training.run import train

    flags = [
        *("--model", model, "--task", "rerank", "--reranker-type", "qwen3", "--data", rows, "--eval-tasks"),
        *("--batch-size", args.batch_size, "--steps", args.steps, "--learning-rate", args.learning_rate),
        *("--max-length", args.max_length, "--save-steps", 0, "--output", f"{work}/run"),
    ]
    settings, _ = from_flags("", "", [str(flag) for flag in flags])
    before = evaluated(Reranker(model, reranker_type="qwen3", max_length=args.max_length, raw_scores=True), test)
    print(f"untrained: {before[3]:.0f} s", flush=True)
    began = time.perf_counter()
    train(settings)
    trained = time.perf_counter() - began
    after = evaluated(Reranker(f"{work}/run/final", raw_scores=True), test)
    export(Export(adapter=f"{work}/run/final", output=f"{work}/exported"))
    return [before, after], trained


def peer_side(test: str, folder: str) -> tuple:
    """Rerank with CrossEncoder and the exported folder."""
    from sentence_transformers import CrossEncoder

    from mlx_retrieval import backend

    backend.prepare()
    return evaluated(Peer(CrossEncoder(folder, device="cpu")), test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl and test/")
    parser.add_argument("--model", help="folder of a decoder (default: SmolLM2 where tools/fetch_smollm2.py puts it)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4, help="queries of a step, each with 5 documents")
    parser.add_argument("--max-length", type=int, default=192, help="tokens of prompt, query and document together")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--queries", type=int, default=40, help="rerank for this many of the test folder")
    args = parser.parse_args()

    from mlx_retrieval.evaluation.results import compare
    from mlx_retrieval.utils.console import print_rows

    model = args.model or sides.smollm2()
    print(sides.machine(), flush=True)
    data = Path(args.data)
    documents = sum(1 for _ in open(data / "test" / "corpus.jsonl", encoding="utf-8"))
    with tempfile.TemporaryDirectory() as work:
        test = str(sides.write_part(data / "test", Path(work) / "test", args.queries, documents))
        rows = f"{work}/mined.jsonl"
        mine(data / "train.jsonl", args.steps * args.batch_size, Path(rows))
        (before, after), training = sides.in_child(our_side, args, model, rows, test, work)
        peer = sides.in_child(peer_side, test, f"{work}/exported")

    first = before[0]
    table = []
    for name, (_, found, _, seconds) in (
        ("BM25", (None, first, None, None)),
        ("untrained", before),
        (f"after {args.steps} steps of {args.batch_size}", after),
        ("exported, CrossEncoder", peer),
    ):
        _, _, score, change, low, high = compare(first, found)[0]
        cells = ("", "", "") if seconds is None else (f"{change:+.4f}", f"[{low:+.4f}, {high:+.4f}]", f"{seconds:.0f}")
        table.append((name, f"{score:.4f}", *cells))
    columns = ("what", "nDCG@10", "to BM25", "95 % interval", "reranking s")
    print_rows(f"MedQuAD test, {args.queries} queries, BM25's first {DEPTH} reranked", columns, table)
    print(f"training {training:.0f} s; CrossEncoder takes {peer[3] / after[3]:.2f} times as long to rerank")
    probabilities = [1 / (1 + np.exp(-scores)) for scores in (after[2], peer[2])]
    difference = np.abs(np.subtract(*probabilities)).max()
    print(f"probabilities of the two libraries differ by {difference:.1e} at most")
    if not difference <= LARGEST_DIFFERENCE:  # nan, too
        sys.exit("CrossEncoder gives other scores with the exported folder")


if __name__ == "__main__":
    main()
