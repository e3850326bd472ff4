"""Search with late-interaction models: candidates by mean vector, MaxSim over their tokens' vectors.

python -m pytest tests/retrieval/test_search_late.py
"""

import json

from mlx_retrieval.backend import mx

import numpy as np
import pytest

from mlx_retrieval.backbones import lora
from mlx_retrieval.evaluation import retrieval
from mlx_retrieval.evaluation.index_search import evaluate, read_queries
from mlx_retrieval.inference import embedder
from mlx_retrieval.models import loading
from mlx_retrieval.retrieval import lance_index
from mlx_retrieval.retrieval.indexer import update
from mlx_retrieval.retrieval.searcher import Searcher
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError

WORDS = ("boiler", "drips", "night", "bike", "squeaks", "rains", "cold", "grey", "morning", "town", "kettle", "hiss")


@pytest.fixture(scope="module")
def model(small, tmp_path_factory) -> embedder.Model:
    """A late-interaction adapter with a projection, loaded as a user would."""
    mx.random.seed(0)
    built, config, _ = loading.build(small, task="late", projection=16)
    adapter = lora.adapt(built.backbone, rank=2)
    folder = tmp_path_factory.mktemp("late") / "adapter"
    files.write_folder(folder, lambda where: loading.save_model(where, built, adapter, config))
    return embedder.load(folder)


@pytest.fixture(scope="module")
def beir(tmp_path_factory):
    """Forty documents of a few words, and queries that are parts of some of them."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("beir") / "task"
    (folder / "qrels").mkdir(parents=True)
    documents = [" ".join(rng.choice(WORDS, rng.integers(3, 30))) + f" {i}" for i in range(40)]
    corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(documents)]
    queries = [{"_id": f"q{i}", "text": " ".join(documents[i].split()[:4])} for i in range(0, 40, 4)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(0, 40, 4))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def index(beir, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "index"
    update(beir, folder, model)
    return folder


def test_semantic_search_is_maxsim(beir, model, index):
    """All chunks are candidates here, so the figures are those of the exhaustive search of eval.py."""
    searcher = Searcher(index)
    assert searcher.index.info.maxsim == "mean"
    results = evaluate(searcher.index, searcher.model, read_queries(beir))
    expected = retrieval.evaluate(model, [str(beir)])
    assert results["semantic"].tasks["queries"]["ndcg_at_10"] == pytest.approx(
        expected.average()["ndcg_at_10"], abs=1e-4
    )
    rows = [json.loads(line) for line in open(beir / "corpus.jsonl")]
    query = "boiler drips at night"
    tokens, documents = model.encode([query], "query")[0], model.encode([row["text"] for row in rows], "document")
    scores = {row["_id"]: float((tokens @ d.T).max(axis=1).mean()) for row, d in zip(rows, documents, strict=True)}
    hits = searcher.search(query, "semantic", top=5)
    assert [hit.path for hit in hits] == sorted(scores, key=lambda name: -scores[name])[:5]
    np.testing.assert_allclose([hit.score for hit in hits], [scores[hit.path] for hit in hits], atol=2e-3)  # float16
    assert {hit.path for hit in searcher.search(query, "hybrid", top=40)} == set(scores)


def test_candidates_are_the_nearest_by_mean_vector(model, index, monkeypatch):
    monkeypatch.setattr(lance_index, "LATE_CANDIDATES", 3)
    searcher = Searcher(index)
    tokens = model.encode(["boiler drips"], "query")[0]
    rows = searcher.index.chunks.to_arrow().to_pylist()
    mean = tokens.sum(axis=0)
    near = sorted(rows, key=lambda row: -float(np.dot(row["vector"], mean)))[:3]
    hits = searcher.index.semantic(tokens, 2)
    assert len(hits) == 2 and {hit.path for hit in hits} <= {row["path"] for row in near}


def test_a_changed_document_is_embedded_again(beir, model, tmp_path):
    folder = tmp_path / "index"
    first = update(beir, folder, model)
    again = update(beir, folder, model)
    assert (first.embedded, again.embedded, again.unchanged) == (40, 0, 40)


def test_an_index_of_single_vectors_is_not_searched_by_tokens(beir, model, index, small):
    with pytest.raises(UserError, match="another model"):
        update(beir, index, embedder.load(small))
