"""How many tokens may be in the backbone at once, measured by small passes before the first step.

    python train.py --micro-batch-tokens auto --dry-run

The loss does not depend on the budget, so memory alone decides it: the largest of a grid of budgets whose step fits
into the free memory of the device, or of the machine and its control groups. Where memory runs out nevertheless and
the backend reports it, `Trainer` halves the budget and repeats the step.
"""

import contextlib
import dataclasses
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_retrieval.backend import mx

from data_loader import Batch
from mlx_retrieval import backend
from mlx_retrieval.training.gradient_cache import GradientCache
from mlx_retrieval.training.step_memory import loss_of_tokens, measure_passes

GRID = tuple(128 << i for i in range(14))  # tokens: 128 to 1,048,576
# Of the free memory. On CPUs a process that takes too much is killed, while a GPU reports an error.
SHARE = 0.8 if backend.IS_GPU else 0.6
# Beyond that, more tokens at once are no quicker (benchmarks/README.md), and only take memory.
MOST = GRID[-1] if backend.IS_GPU else backend.MICRO_BATCH_TOKENS
MEMINFO = Path("/proc/meminfo")
SAMPLES = 2  # batches that `fit` should see


@dataclass(frozen=True)
class Fit:
    """A budget of tokens, and the memory that it takes, in bytes."""

    budget: int
    estimate: int  # the peak of a step with that budget
    free: int  # memory that the process may still take

    def __str__(self) -> str:
        warning = "" if self.estimate <= self.free else ", which may be too little: see --grad-checkpoint, --max-length"
        return (
            f"about {self.estimate / 1e9:.2f} GB at most, an estimate, with {self.budget:,} tokens at once; "
            f"{self.free / 1e9:.2f} GB are free{warning}"
        )


# --- how much there is ----------------------------------------------------------------------------------------------


def free() -> int:
    """Return the bytes that this process may still take: of the GPU, or of the machine and its control groups."""
    if backend.IS_GPU:
        info = backend.device_info()
        total = info.get("max_recommended_working_set_size") or info.get("total_memory") or mx.get_memory_limit()
        unused = info["free_memory"] + mx.get_cache_memory() if info.get("free_memory") else total
        return int(min(total - mx.get_active_memory(), unused))
    limits = [value for value in (_free_of_machine(), *_free_of_groups()) if value is not None]
    if not limits:  # macOS reports only how much is built in
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    return max(0, min(limits)) + mx.get_cache_memory()


def total() -> int:
    """Return the bytes that there are for this process if nothing else runs: of the GPU, or of the machine."""
    if backend.IS_GPU:
        info = backend.device_info()
        return int(info.get("memory_size") or info.get("total_memory") or mx.get_memory_limit())
    whole = _meminfo("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([whole, *_limits_of_groups()])


def _free_of_machine(meminfo: Path = MEMINFO) -> int | None:
    return _meminfo("MemAvailable", meminfo)


def _meminfo(name: str, meminfo: Path = MEMINFO) -> int | None:
    for line in meminfo.read_text().splitlines() if meminfo.is_file() else ():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _free_of_groups(root: Path = Path("/")) -> Iterator[int]:
    """Yield the bytes left below the limit of each control group, v1 or v2, that this process is in."""
    for folder, names in _groups(root):
        if (left := _left(folder, *names)) is not None:
            yield left


def _limits_of_groups(root: Path = Path("/")) -> Iterator[int]:
    """Yield the limits of the control groups that this process is in, in bytes."""
    for folder, (limit, *_) in _groups(root):
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
            yield int((folder / limit).read_text())


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yield the folder of each control group that this process may be in, and its files' names; see `_left`."""
    listing = root / "proc/self/cgroup"
    for line in listing.read_text().splitlines() if listing.is_file() else ():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):  # in containers the mount may lack the path; it always has the top
            yield mount / folder, names


def _left(folder: Path, limit: str, usage: str, cached: str) -> int | None:
    """Return the bytes left below a group's limit, cached files counted as free; None without a limit."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
        left = int((folder / limit).read_text()) - int((folder / usage).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        return left + next((int(line.split()[1]) for line in lines if line.startswith(f"{cached} ")), 0)
    return None


# --- the budget -----------------------------------------------------------------------------------------------------


def fit(grad_cache: GradientCache, samples: Sequence[Batch]) -> Fit:
    """Choose the budget of a run's steps and set it, together with mlx's limits. Weights stay as they are.

    Args:
        grad_cache: computes the steps; its `budget` is set.
        samples: batches, among whose texts the longest stands for the longest of the run.
    """
    texts = max((batch.texts for batch in samples), key=lambda texts: texts.lengths.max())
    losses = [loss_of_tokens(batch.texts.lengths, batch.queries) for batch in samples if isinstance(batch, Batch)]
    step = measure_passes(grad_cache, texts, max(losses, default=0))
    mx.clear_cache()
    active = mx.get_active_memory()
    room = free()

    def estimate(budget: int) -> int:
        cutting = dataclasses.replace(grad_cache.cutting, budget=budget)
        return active + max(step.peak(batch.texts.lengths, cutting) for batch in samples)

    useful = min(MOST, max(batch.tokens for batch in samples))  # a budget that holds the whole batch need not be larger
    grid = [budget for budget in GRID if budget < 2 * useful]
    budget = max((b for b in grid if estimate(b) - active <= SHARE * room), default=grid[0])
    result = Fit(budget, estimate(budget), room)
    grad_cache.budget = budget
    _set_limits(active + room, result.estimate)
    return result


def bound_cache() -> None:
    """After a step on a GPU, bound mlx's cache of freed arrays by a step's peak, and by the memory left beside it.

    The next step's arrays have other shapes, so mlx would cache more until all memory is taken (benchmarks/LOG.md).
    """
    if backend.IS_GPU:
        _bound_cache(mx.get_active_memory() + free(), backend.peak_memory())


def _bound_cache(whole: int, used: int) -> None:
    """Let mlx cache freed arrays for the next step, as far as `whole` bytes have room beside `used`."""
    mx.set_cache_limit(min(used, max(whole - used, whole // 16)))


def _set_limits(whole: int, estimate: int) -> None:
    """Bound mlx's cache, and on Metal keep the memory in use resident."""
    if backend.IS_GPU:
        _bound_cache(whole, estimate)
    if platform.system() == "Darwin" and mx.metal.is_available():
        mx.set_wired_limit(int(backend.device_info()["max_recommended_working_set_size"]))
