"""`--gguf-ready` through llama.cpp, its own converter and its own runtime: what LM Studio and Ollama embed with.

python tools/fetch_llama_cpp.py && pip install -r tests/readers.txt
python -m pytest -m slow tests/exporters/test_llama_cpp.py

LM Studio itself is no library. It lists the files that lie in `PUBLISHER/MODEL/` as here, and gives them to llama.cpp.
"""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import random_encoders
import random_families
import random_models
from exported import run_export
from trained_models import trained

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import fetch_llama_cpp  # noqa: E402  (tools/ has to be on the path first)

from mlx_retrieval.exporters import parity  # noqa: E402
from mlx_retrieval.inference import embedder  # noqa: E402

TEXTS = ["A kidney stone is a hard piece of material.", "what is it?", "Où est-il, l'été 2026?", "the cat sat " * 30]
EMBED = """
import json, sys
import xllamacpp

file, pooling, attention, *texts = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.embedding, params.warmup = file, True, False
params.pooling_type = getattr(xllamacpp.llama_pooling_type, "LLAMA_POOLING_TYPE_" + pooling)
params.attention_type = getattr(xllamacpp.llama_attention_type, "LLAMA_ATTENTION_TYPE_" + attention)
params.n_ctx = params.n_batch = params.n_ubatch = 512
params.n_parallel = 1
server = xllamacpp.Server(params)
print(json.dumps([row["embedding"] for row in server.handle_embeddings({"input": texts})["data"]]))
"""


@pytest.fixture(scope="module")
def converter() -> Path:
    """The converter of llama.cpp, where its runtime is installed too."""
    if not fetch_llama_cpp.is_there(folder := fetch_llama_cpp.default_folder()):
        pytest.skip("llama.cpp's converter is not on this machine: python tools/fetch_llama_cpp.py fetches it")
    if not importlib.util.find_spec("xllamacpp"):
        pytest.skip("llama.cpp is not installed: pip install -r tests/readers.txt")
    return folder / fetch_llama_cpp.FILE


@pytest.fixture(autouse=True)
def quick_check(monkeypatch) -> None:
    """Export's own check looks at fewer and shorter texts than it does for users."""
    monkeypatch.setattr(parity, "COUNTS", (1, 4, 25))
    monkeypatch.setattr(parity, "LONGEST", 30)


def run(*words) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def converted(converter: Path, folder: Path, models: Path) -> Path:
    """The folder's GGUF, where LM Studio looks for it."""
    file = models / "me" / "my-model" / "my-model-f32.gguf"
    file.parent.mkdir(parents=True)
    run(converter, folder, "--outfile", file, "--outtype", "f32")
    return file


def llama_cpp_vectors(
    file: Path, texts: list[str], pooling: str = "UNSPECIFIED", attention: str = "UNSPECIFIED"
) -> np.ndarray:
    return np.array(json.loads(run("-c", EMBED, file, pooling, attention, *texts).splitlines()[-1]))


def worst_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(((ours * theirs).sum(axis=1) / np.linalg.norm(theirs, axis=1)).min())


def names(home) -> tuple[str, ...]:
    """The families whose random models a helper writes."""
    return tuple(getattr(home, "SETTINGS", None) or home.KINDS)


def with_tokenizer_of(model: Path, folder: Path) -> Path:
    """Put the tokenizer of a real model, which the converter has to know, into the folder of a random one."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (model / name).is_file():
            shutil.copy(model / name, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_trained_encoder(converter, minilm, tmp_path, pooling):
    """The file says how it pools."""
    _, adapter = trained(minilm, tmp_path / "run" / "final", pooling=pooling)
    folder = run_export(tmp_path / "out", adapter=adapter, gguf_ready=True, dtype="float32")
    found = llama_cpp_vectors(converted(converter, folder, tmp_path / "models"), TEXTS)
    ours = embedder.load(folder)
    assert worst_cosine(ours.encode(TEXTS, "document"), found) > 0.9999
    untrained = embedder.load(minilm).encode(TEXTS, "document")
    assert worst_cosine(untrained, found) < 0.98  # training changed something


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distilbert", "roberta", "modernbert", "eurobert", "qwen3", "mistral"])
def test_a_random_model_of_another_family(converter, minilm, smollm2, tmp_path, kind):
    """With the tokenizer of a real model, as the converter refuses tokenizers that it does not know."""
    words = kind == "distilbert"
    shape = {"head_dim": 16} if kind == "eurobert" else {}
    save = next(home.save for home in (random_families, random_encoders, random_models) if kind in names(home))
    base = save(kind, tmp_path / "base", vocab_size=30522 if words else 49152, max_position_embeddings=514, **shape)
    with_tokenizer_of(minilm if words else smollm2 / "float32", base)
    flags = {"pooling": "last" if kind in ("qwen3", "mistral") else "cls", "pool_special": True}
    _, adapter = trained(base, tmp_path / "run" / "final", **flags)
    folder = run_export(tmp_path / "out", adapter=adapter, gguf_ready=True, dtype="float32")
    pooling = "LAST" if kind in ("qwen3", "mistral") else "UNSPECIFIED"
    found = llama_cpp_vectors(converted(converter, folder, tmp_path / "models"), TEXTS, pooling)
    ours = embedder.load(folder)
    if kind == "modernbert":  # its converter always puts these tokens around a text, as a real one's tokenizer does
        ours.tokenizer.opening, ours.tokenizer.closing = [1], [2]
    assert worst_cosine(ours.encode(TEXTS, "document"), found) > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize(("pooling", "bidirectional"), [("last", False), ("mean", False), ("mean", True)])
def test_a_trained_decoder(converter, smollm2, tmp_path, capsys, pooling, bidirectional):
    """With the flags that the export says."""
    base = smollm2 / "float32"
    flags = {"pooling": pooling, "bidirectional": bidirectional, "pool_special": True}
    _, adapter = trained(base, tmp_path / "run" / "final", **flags)
    folder = run_export(tmp_path / "out", adapter=adapter, gguf_ready=True, dtype="float32")
    told = capsys.readouterr().out
    assert f"--pooling {pooling}" in told and ("--attention non-causal" in told) == bidirectional
    file = converted(converter, folder, tmp_path / "models")
    attention = "NON_CAUSAL" if bidirectional else "UNSPECIFIED"
    found = llama_cpp_vectors(file, TEXTS, pooling.upper(), attention)
    assert worst_cosine(embedder.load(folder).encode(TEXTS, "document"), found) > 0.9999


# --- the tool ---------------------------------------------------------------------------------------------------------


def pip(monkeypatch, files: dict[str, bytes]) -> None:
    """Let pip's download be a source archive of these files."""

    def run(command, **_):
        assert "--no-binary" in command
        with tarfile.open(Path(command[command.index("--dest") + 1]) / "a.tar.gz", "w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


def test_the_converter_alone_is_kept(tmp_path, monkeypatch):
    home = "llama_cpp_python-0.3.36/vendor/llama.cpp/"
    kept = ["LICENSE", "conversion/bert.py", "convert_hf_to_gguf.py", "gguf-py/gguf/constants.py"]
    others = ["README.md", "src/llama.cpp", "gguf-py/README.md", "examples/conversion/x.py"]
    pip(monkeypatch, {home + name: name.encode() for name in kept + others} | {"llama_cpp_python-0.3.36/LICENSE": b""})
    monkeypatch.setattr(sys, "argv", ["fetch_llama_cpp.py", "--output", str(tmp_path / "new")])
    assert fetch_llama_cpp.main() == fetch_llama_cpp.main() == 0  # the second finds it
    found = {str(f.relative_to(tmp_path / "new")): f.read_text() for f in (tmp_path / "new").rglob("*") if f.is_file()}
    assert found == {name: name for name in kept}


def test_a_package_without_the_converter_is_one_line(tmp_path, monkeypatch, capsys):
    pip(monkeypatch, {"x/vendor/llama.cpp/LICENSE": b""})
    monkeypatch.setattr(sys, "argv", ["fetch_llama_cpp.py", "--output", str(tmp_path / "new")])
    assert fetch_llama_cpp.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not hold the convert_hf_to_gguf.py" in line and not any(tmp_path.iterdir())
