"""How many tokens may be in the backbone at once: measured by small passes before the first step, not guessed.

    python train.py --micro-batch-tokens auto --dry-run

The loss does not depend on the budget, so memory alone decides it: the largest of a grid of budgets whose step has room
in what is free of the device's memory, or of the machine's and its control group's. Where memory runs out all the
same and the backend says so, `differentiate` halves the budget and repeats the step.
"""

import contextlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np

from mlx_retrieval import backend
from mlx_retrieval.models.batching import pad_rows

GRID = tuple(128 << i for i in range(14))  # tokens: 128 to 1,048,576
# Of what is free. Processes that take too much are killed on CPUs, while a GPU says no.
SHARE = 0.8 if backend.IS_GPU else 0.6
# More tokens at once are no quicker there (benchmarks/README.md), and only take memory.
MOST = GRID[-1] if backend.IS_GPU else backend.MICRO_BATCH_TOKENS
SAMPLES = 2  # batches among whose texts the longest is looked for


@dataclass(frozen=True)
class Fit:
    """A budget of tokens and what is known of the memory that it takes, in bytes."""

    budget: int
    estimate: int  # peak of a step under that budget
    free: int  # beyond what is taken already

    def __str__(self) -> str:
        least = "" if self.estimate <= self.free else ", which may be too little: see --grad-checkpoint, --max-length"
        return (
            f"about {self.estimate / 1e9:.2f} GB at most, an estimate, with {self.budget:,} tokens at once; "
            f"{self.free / 1e9:.2f} GB are free{least}"
        )


# --- how much there is ----------------------------------------------------------------------------------------------


def free() -> int:
    """Bytes that this process may still take: of the GPU, or of the machine and of its control group."""
    if backend.IS_GPU:
        info = mx.device_info()
        whole = info.get("max_recommended_working_set_size") or info.get("total_memory") or mx.get_memory_limit()
        unused = info["free_memory"] + mx.get_cache_memory() if info.get("free_memory") else whole
        return int(min(whole - mx.get_active_memory(), unused))
    found = [value for value in (_free_of_machine(), *_free_of_groups()) if value is not None]
    if not found:  # macOS tells no more than how much is built in
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    return max(0, min(found)) + mx.get_cache_memory()


def _free_of_machine(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    for line in meminfo.read_text().splitlines() if meminfo.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _free_of_groups(root: Path = Path("/")) -> Iterator[int]:
    """What is left below the limit of each control group that this process is in, of either version."""
    said = root / "proc/self/cgroup"
    for line in said.read_text().splitlines() if said.is_file() else ():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):  # in containers the path may be none of the mount's; the top always is
            if (left := _left(mount / folder, *names)) is not None:
                yield left


def _left(folder: Path, limit: str, usage: str, cached: str) -> int | None:
    """Bytes below a group's limit; None where it has none. Files that are only cached give way."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
        left = int((folder / limit).read_text()) - int((folder / usage).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        return left + next((int(line.split()[1]) for line in lines if line.startswith(f"{cached} ")), 0)
    return None


# --- how much a step takes ------------------------------------------------------------------------------------------


def fit(trainer: "Trainer") -> Fit:  # noqa: F821  (trainer.py stands above this file)
    """Choose the budget of a trainer's steps, and set it there, with mlx's limits. Weights stay as they are."""
    step, batches = trainer.grad_cache, trainer.batches
    trainer.model.train()
    samples = [batches.batch(k) for k in range(SAMPLES)]
    texts = max((batch.texts for batch in samples), key=lambda texts: texts.lengths.max())
    widest, many = int(texts.lengths.argmax()), max(len(batch.texts) for batch in samples)
    mx.clear_cache()
    room, active = free(), mx.get_active_memory()
    # A row of the longest text, then two: what a token takes where it takes most, and what does not depend on it.
    one, outcome = _cost(step, pad_rows(texts, np.array([widest]), step.pad_id))
    two, _ = _cost(step, pad_rows(texts, np.array([widest, widest]), step.pad_id))
    width = int(texts.lengths[widest])
    token, always = max(0, two - one) / width, max(0, 2 * one - two)
    kept = 2 * many * outcome  # representations and their gradients
    workers = step.runner.workers
    tokens = max(batch.tokens for batch in samples)
    held = step.runner.held_bytes(tokens)

    def estimate(budget: int) -> int:
        return int(active + kept + held + workers * (always + token * max(budget, width)))

    useful = min(MOST, tokens)  # what holds a batch whole needs not be larger
    grid = [budget for budget in GRID if budget < 2 * useful]
    budget = max((b for b in grid if estimate(b) - active <= SHARE * room), default=grid[0])
    chosen = Fit(budget, estimate(budget), room)
    step.budget = trainer.state.micro_batch_tokens = budget
    _set_limits(active + room, chosen.estimate)
    return chosen


def _cost(step: "GradientCache", rows) -> tuple[int, int]:  # noqa: F821
    """Bytes that the passes of a micro-batch take at their peak, and those of one row's representation."""
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    parts = list(step.runner.representations([rows], [0]))
    step.runner.gradient([rows], [0], [mx.zeros_like(parts[0])])
    return mx.get_peak_memory() - active, parts[0].nbytes // len(parts[0])


def bound_cache() -> None:
    """After a step on a GPU: keep no more freed arrays than a step takes at its peak, nor than find room beside it.

    What the next step asks for has other shapes, so mlx would go on until all memory is taken (benchmarks/LOG.md).
    """
    if backend.IS_GPU:
        _bound_cache(mx.get_active_memory() + free(), backend.peak_memory())


def _bound_cache(whole: int, used: int) -> None:
    """Of `whole` bytes: let mlx keep what is freed for the next step, as far as there is room beside `used`."""
    mx.set_cache_limit(min(used, max(whole - used, whole // 16)))


def _set_limits(whole: int, estimate: int) -> None:
    """Bound what mlx keeps, and on Metal let what is used be resident."""
    if backend.IS_GPU:
        _bound_cache(whole, estimate)
    if platform.system() == "Darwin" and mx.metal.is_available():
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))


# --- when it was not enough -----------------------------------------------------------------------------------------
