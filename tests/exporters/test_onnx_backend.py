"""The exported folder through sentence-transformers' own ONNX backend.

python -m pytest tests/exporters/test_onnx_backend.py

The backend needs older libraries than the toolkit: tests/onnx.txt says how to install them in an environment of their
own, whose Python ONNX_PYTHON names. Without it, the tests are skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import random_encoders
import random_models
from exported import run_export
from trained_models import trained

from mlx_retrieval.inference import embedder

TEXTS = ["a kidney stone is a hard piece of material", "the cat", "what is it"]
ENCODE = """
import json, sys
from sentence_transformers import SentenceTransformer

folder, prompt, *texts = sys.argv[1:]
model = SentenceTransformer(folder, backend="onnx", device="cpu", local_files_only=True)
kind = type(model[0].auto_model).__name__
print(json.dumps([kind, model.encode(texts, prompt_name=prompt).tolist()]))
"""


@pytest.fixture(scope="module")
def python() -> str:
    """The Python of an environment with the backend."""
    path = os.environ.get("ONNX_PYTHON")
    if not path:
        pytest.skip("ONNX_PYTHON names no Python with the libraries of tests/onnx.txt")
    return path


def onnx_vectors(python: str, folder: Path, prompt: str) -> np.ndarray:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("PYTHONPATH", None)
    words = [python, "-c", ENCODE, str(folder), prompt, *TEXTS]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    kind, vectors = json.loads(done.stdout.splitlines()[-1])
    assert kind == "ORTModelForFeatureExtraction"
    return np.array(vectors)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_the_same_vectors(python, tmp_path, kind):
    save = random_models.save if kind == "bert" else random_encoders.save
    base = random_models.word_tokenizer(save(kind, tmp_path / "base", max_position_embeddings=200, pad_token_id=0))
    _, adapter = trained(base, tmp_path / "run" / "final", pooling="cls", query_prompt="what ")
    folder = run_export(tmp_path / "out", adapter=adapter)
    ours = embedder.load(folder)
    for prompt in ("query", "document"):
        found = onnx_vectors(python, folder, prompt)
        np.testing.assert_allclose(found, ours.encode(TEXTS, prompt), rtol=0, atol=1e-4)
