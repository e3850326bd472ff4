"""A real decoder, trained as an embedding model and as a reranker: other libraries compute the same from its export.

python tools/fetch_smollm2.py                             once; without it these tests are skipped, and say so
python -m pytest -m slow tests/training/test_real_decoder.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
from random_rerankers import ANSWERS, ASKED, graded_rows

from mlx_retrieval.exporters.job import Export
from mlx_retrieval.exporters.run import export
from mlx_retrieval.inference.embedder import load
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.config import Settings
from mlx_retrieval.utils import files

pytestmark = pytest.mark.slow
TEXTS = (*ANSWERS, "Où est-il ? 你好", "which animal did sit there? " * 30)  # the last one is cut off


@pytest.fixture
def trained(smollm2, tmp_path):
    """`trained(task=...)` returns the base model's folder, and an adapter of it after two steps, far from the base."""

    def train(**changes) -> tuple[str, str]:
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in graded_rows()))
        base = str(smollm2 / "float32")
        settings = {"model": base, "data": [str(data)], "output": str(tmp_path / "run"), "batch_size": 3, "steps": 2}
        settings |= {"learning_rate": 0.01, "warmup": 0.0, "eval_tasks": [], "save_steps": 0, "lora_rank": 4}
        run = training_run.prepare(Settings(**settings | changes))
        for step in range(2):
            run.trainer.update(run.trainer.batches.batch(step), step + 1)
        files.write_folder(tmp_path / "adapter", run.trainer.save_model)
        return base, str(tmp_path / "adapter")

    return train


def exported(adapter: str, folder: Path) -> str:
    return str(export(Export(adapter=adapter, output=str(folder), skip_library_check=True)))


def test_an_embedding_model_in_sentence_transformers(trained, tmp_path):
    from sentence_transformers import SentenceTransformer

    base, adapter = trained(max_length=48, pooling="last")
    vectors = load(adapter).encode(TEXTS)
    before = load(base, max_length=48, pooling="last").encode(TEXTS)
    assert np.abs(vectors - before).max() > 0.01  # training changed something
    theirs = SentenceTransformer(exported(adapter, tmp_path / "exported"), device="cpu").encode(list(TEXTS))
    np.testing.assert_allclose(theirs, vectors, rtol=0, atol=1e-4)


def test_a_reranker_in_cross_encoder(trained, tmp_path):
    from sentence_transformers import CrossEncoder

    limit = 160  # in tokens, the prompt among them
    base, adapter = trained(task="rerank", reranker_type="qwen3", max_length=limit)
    scores = Reranker(adapter).score(ASKED[0], list(TEXTS))
    before = Reranker(base, reranker_type="qwen3", max_length=limit).score(ASKED[0], list(TEXTS))
    assert np.abs(scores - before).max() > 0.01  # training changed something
    model = CrossEncoder(exported(adapter, tmp_path / "exported"), device="cpu")
    theirs = model.predict([(ASKED[0], text) for text in TEXTS])
    np.testing.assert_allclose(theirs, scores, rtol=0, atol=1e-4)
