"""Measure what word overlap alone reaches: BM25's nDCG@10 on a folder in BEIR layout.

    python benchmarks/bm25.py eval-data

It is the BM25 of `eval.py --task rerank`, its first stage, and it is scored as eval.py scores a model.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from mlx_retrieval.dataset import beir
from mlx_retrieval.evaluation.first_stages import scores_by_rank
from mlx_retrieval.evaluation.results import METRICS
from mlx_retrieval.evaluation.retrieval import score_rankings
from mlx_retrieval.retrieval.bm25 import bm25


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "eval-data")
    corpus, queries, qrels = beir.read_folder(folder)
    documents = {name: beir.document_text(*row) for name, row in corpus.items()}
    found = bm25(documents, {name: text for name, (_, text) in queries.items()})
    scores = score_rankings(qrels, {query: scores_by_rank(ids) for query, ids in found.items()})
    print(f"BM25 on {folder}: {len(corpus):,} documents, {len(queries):,} queries")
    for metric, name in METRICS.items():
        print(f"{name:<12}{np.mean(list(scores[metric].values())):.4f}")


if __name__ == "__main__":
    main()
