"""What all tests of evaluation share."""

from pathlib import Path

import numpy as np
import pytest
from beir_folders import write_folder

from mlx_retrieval.evaluation import mteb_tasks
from mlx_retrieval.inference import dtypes
from mlx_retrieval.models import kinds


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> Path:
    """150 documents and 40 queries of random words: rankings that are neither perfect nor hopeless."""
    rng = np.random.default_rng(5)
    vocabulary = [f"w{i}" for i in range(300)]
    corpus = [{"_id": f"d{i}", "text": " ".join(rng.choice(vocabulary, 20))} for i in range(150)]
    queries, qrels = [], ""
    for i in range(40):
        words = corpus[i]["text"].split()
        queries.append({"_id": f"q{i}", "text": " ".join([*rng.choice(words, 2), *rng.choice(vocabulary, 3)])})
        qrels += f"q{i}\td{i}\t2\nq{i}\td{i + 40}\t1\nq{i}\td{i + 80}\t0\n"
    return write_folder(tmp_path_factory.mktemp("data") / "words", corpus, queries, qrels)


@pytest.fixture(autouse=True)
def _unnamed_models(monkeypatch):
    """Models that tests replace, `m` or `[m]`, count as embedding models; all others tell themselves."""
    detect = kinds.detect_kind
    monkeypatch.setattr(kinds, "detect_kind", lambda *names: "embed" if names[0] in ("m", "[m]") else detect(*names))


@pytest.fixture(autouse=True)
def _models_without_a_backbone(monkeypatch):
    """Models that tests replace compute in no dtype; all others tell theirs."""
    report = dtypes.report
    monkeypatch.setattr(dtypes, "report", lambda *models: report(*(m for m in models if hasattr(m, "model"))))


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """An empty cache and no network: what mteb is asked for cannot be reached."""
    import datasets
    from huggingface_hub import constants

    # Of a folder, datasets finds an earlier copy by its name and the names of its files, whatever they hold.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    mteb_tasks._hub_answers.cache_clear()
    mteb_tasks._load.cache_clear()
    yield tmp_path / "cache"
    mteb_tasks._hub_answers.cache_clear()
    mteb_tasks._load.cache_clear()
