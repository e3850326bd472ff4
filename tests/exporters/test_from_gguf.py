"""A GGUF is trained, used and exported like any base model; each test runs the commands on a small one.

python -m pytest tests/exporters/test_from_gguf.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from huggingface_hub import constants

import export
import train
from mlx_retrieval import backend
from mlx_retrieval.backbones import resolve
from mlx_retrieval.inference.embedder import load

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))


def test_an_embedding_model_from_a_gguf(tmp_path, rows, monkeypatch, capsys):
    """The adapter names the file from any folder, and sentence-transformers loads the export."""
    path = gguf_files.write(tmp_path / "m.gguf", "qwen3", "Q8_0")
    monkeypatch.chdir(tmp_path)
    flags = ["--steps", "2", "--batch-size", "8", "--save-steps", "0", "--eval-tasks", "--max-length", "64"]
    assert train.main(["--model", "m.gguf", "--data", rows, "--output", "run", *flags]) == 0
    assert json.loads(Path("run/final/retrieval_config.json").read_text())["base_model"] == str(path)
    model = load("run/final")
    texts = ["a kidney stone", "the cat sat on the mat"]
    vectors = model.encode(texts)
    assert np.abs(vectors - load(path, max_length=64).encode(texts)).max() > 1e-4
    flags = ["--dtype", "float32", "--output", "exported"]
    assert export.main(["--adapter", "run/final", *flags]) == 0
    from sentence_transformers import SentenceTransformer

    np.testing.assert_allclose(SentenceTransformer("exported").encode(texts), vectors, rtol=0, atol=1e-4)


def test_a_command_opens_a_gguf_in_a_process_of_its_own(tmp_path):
    """Regression: commands hide torch, without which transformers reads no GGUF; here, tests have imported it."""
    path = gguf_files.write(tmp_path / "m.gguf", "gemma3", "Q4_0")
    (tmp_path / "docs.txt").write_text("a kidney stone\nthe cat\n")
    files = ("--input", str(tmp_path / "docs.txt"), "--output", str(tmp_path / "vectors.npy"))
    environment = os.environ | {"HF_ASSETS_CACHE": str(tmp_path / "assets")}
    command = (sys.executable, str(ROOT / "embed.py"), "--model", str(path), *files)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "m.gguf: converted once, into " in done.stderr and "transformers" not in done.stderr
    assert np.load(tmp_path / "vectors.npy").shape == (2, 64)


def test_a_chat_model_from_a_gguf(tmp_path, write_rows, capsys, monkeypatch):
    """Quantised, as on GPUs. mlx-lm's commands, which the run prints, get the folder that the file was converted to."""
    monkeypatch.setattr(backend, "IS_GPU", True)
    from mlx_lm.utils import load as load_in_mlx_lm

    path = gguf_files.write(tmp_path / "m.gguf", "llama", "Q4_0")
    turns = [{"role": "user", "content": "the stone"}, {"role": "assistant", "content": "is a hard piece"}]
    data = write_rows([{"messages": turns}] * 4, "train.jsonl")
    output = tmp_path / "run"
    flags = ["--data", str(data), "--output", str(output), "--steps", "2", "--save-steps", "0", "--mask-prompt"]
    assert train.main(["--task", "chat", "--model", str(path), *flags]) == 0
    folder = resolve(str(path))
    assert f"mlx_lm.generate --model {folder} --adapter-path {output / 'final'}" in capsys.readouterr().out
    assert json.loads((output / "final" / "adapter_config.json").read_text())["model"] == str(path)
    load_in_mlx_lm(str(folder), adapter_path=str(output / "final"))
    flags = ["--adapter", str(output / "final"), "--output", str(tmp_path / "chat"), "--format", "hf"]
    assert export.main(flags) == 0
    assert "<|im_start|>" in (tmp_path / "chat" / "chat_template.jinja").read_text()
