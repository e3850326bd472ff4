"""What word overlap alone reaches: BM25's nDCG@10 on a folder in BEIR layout.

    python benchmarks/bm25.py eval-data

bm25s with its defaults and English stop words, scored as eval.py scores a model.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bm25s
import numpy as np

import eval_tasks
from eval import METRICS, score_rankings


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "eval-data")
    corpus, queries, qrels = eval_tasks.read_folder(folder)
    ids, asked = list(corpus), list(qrels)
    retriever = bm25s.BM25()
    texts = [" ".join(filter(None, corpus[d])) for d in ids]
    retriever.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    words = bm25s.tokenize([queries[q][1] for q in asked], stopwords="en", return_ids=False, show_progress=False)
    rankings = {}
    for query, terms in zip(asked, words, strict=True):
        scores = retriever.get_scores(terms)
        rankings[query] = {ids[i]: float(scores[i]) for i in np.argsort(-scores, kind="stable")[:1000]}
    scores = score_rankings(qrels, rankings)
    print(f"BM25 on {folder}: {len(ids):,} documents, {len(asked):,} queries")
    for metric, name in METRICS.items():
        print(f"{name:<12}{np.mean(list(scores[metric].values())):.4f}")


if __name__ == "__main__":
    main()
