"""Saved indices hold fingerprints, so their bytes must not change.

python -m pytest tests/inference/test_fingerprint.py
"""

import dataclasses
import hashlib
import json

from mlx_retrieval.inference.fingerprint import fingerprint
from mlx_retrieval.models.retrieval_config import RetrievalConfig


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
