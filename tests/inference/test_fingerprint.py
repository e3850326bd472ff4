"""Saved indices hold fingerprints, so their bytes must not change.

python -m pytest tests/inference/test_fingerprint.py
"""

import dataclasses
import hashlib
import json

import numpy as np
from safetensors.numpy import save_file

from mlx_retrieval.inference.embedder import load
from mlx_retrieval.inference.fingerprint import fingerprint
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.retrieval.indexer import update
from mlx_retrieval.retrieval.lance_index import Index
from mlx_retrieval.retrieval.searcher import Searcher
from mlx_retrieval.utils import files


def test_the_bytes_that_are_hashed(tmp_path):
    """Settings, then name, size and content of the base's files and the adapter's; where folders lie does not count."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    files = {"model.safetensors": b"m", "2_Dense/model.safetensors": b"dense", "config.json": b"{}"}
    for folder, contents in ((base, files), (adapter, {"adapters.safetensors": b"a", "adapter_config.json": b"{}"})):
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    (base / "README.md").write_text("not hashed")
    (adapter / "optimizer.safetensors").write_text("not hashed")
    config = RetrievalConfig(base_model=str(base))
    values = dataclasses.asdict(config) | {"base_model": ""}
    assert values.pop("truncate_dim") == 0  # a field of later versions, hashed where it is set
    assert values.pop("dtype") == "auto"  # of later versions, too; never hashed
    settings = json.dumps(values, sort_keys=True).encode()
    base_bytes = settings + b"model.safetensors 1\nmmodel.safetensors 5\ndenseconfig.json 2\n{}"
    adapter_bytes = b"adapters.safetensors 1\naadapter_config.json 2\n{}"
    assert fingerprint(config, base) == hashlib.sha256(base_bytes).hexdigest()
    assert fingerprint(config.override(truncate_dim=8), base) != fingerprint(config, base)
    assert fingerprint(config.override(dtype="bfloat16"), base) == fingerprint(config, base)
    assert fingerprint(config, base, adapter) == hashlib.sha256(base_bytes + adapter_bytes).hexdigest()


def test_a_change_of_one_layer_of_a_large_file_is_seen(tmp_path, monkeypatch):
    """Blocks are spread over it, and trained layers may lie between them: a stale index passed for current."""
    monkeypatch.setattr(files, "READ_WHOLE", 1_000)
    monkeypatch.setattr(files, "BLOCKS", 3)
    monkeypatch.setattr(files, "BLOCK", 4_000)
    weights = {f"layers.{i}.weight": np.full(3_000, i, np.float32) for i in range(20)}
    weights |= {"scale": np.ones(1, np.float32), "none": np.ones(0, np.float32)}
    config, found, before = RetrievalConfig(base_model=""), set(), set()
    for change in (None, *weights):
        changed = {name: array + (name == change) for name, array in weights.items()}
        save_file(changed, tmp_path / "model.safetensors")
        found.add(fingerprint(config, tmp_path))
        before.add(fingerprint(config, tmp_path, by_tensor=False))
    assert len(found) == 22 and len(before) < 10  # of 21 tensors with numbers, and of the file as it was


def test_indices_of_before_are_taken_for_what_they_are(small, tmp_path, monkeypatch):
    """Their fingerprint is of fewer places; it is accepted once, and replaced."""
    monkeypatch.setattr(files, "READ_WHOLE", 1_000)
    monkeypatch.setattr(files, "BLOCK", 100)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("a kettle")
    model, index = load(small), tmp_path / "index"
    earlier = model._fingerprint(by_tensor=False)
    assert earlier != model.fingerprint() and model.is_of(earlier) and not model.is_of("f" * 64)
    compute, hashed = model._fingerprint, []
    monkeypatch.setattr(model, "_fingerprint", lambda by_tensor: hashed.append(by_tensor) or compute(by_tensor))
    assert model.is_of(compute(True)) and hashed == [True]  # every search asks, and the model's files are read for it
    update(tmp_path / "docs", index, model)
    made = Index.open(index)
    made.info.fingerprint = earlier
    made.write()
    assert Searcher(index).model.name == model.name
    assert update(tmp_path / "docs", index, model).embedded == 0
    assert Index.open(index).info.fingerprint == model.fingerprint()
