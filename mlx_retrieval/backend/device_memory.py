"""How much memory there is for this process, and how much of it mlx may hold: freed arrays, and what stays resident.

device_memory.free()                    bytes that this process may still take
device_memory.bound_cache()             at the start, and after each chunk of work
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path

from mlx_retrieval.backend import mx

from mlx_retrieval import backend

# Of the free memory, for what a run takes. On CPUs a process that takes too much is killed; a GPU reports an error.
CPU_SHARE, GPU_SHARE = 0.6, 0.8
LEAST_CACHE = 1 / 16  # of all memory, which freed arrays may always take
# Of the free memory, for products that steps on a CPU keep from their forward passes; and what they may always take.
KEPT_SHARE, LEAST_KEPT = 0.2, 384 << 20
MEMINFO = Path("/proc/meminfo")
sharers = 1  # processes that train as one and may be on this machine


def share() -> float:
    """Return the share of the free memory that a run may plan with."""
    return GPU_SHARE if backend.IS_GPU else CPU_SHARE


def free() -> int:
    """Return the bytes that this process may still take: of the GPU, or of the machine and its control groups."""
    if backend.IS_GPU:
        info = backend.device_info()
        whole = info.get("max_recommended_working_set_size") or info.get("total_memory") or mx.get_memory_limit()
        unused = info["free_memory"] if info.get("free_memory") else _unused_on_mac(info)
        left = whole - mx.get_active_memory()
        return max(0, int(left if unused is None else min(left, unused + mx.get_cache_memory())))
    limits = [value for value in (_free_of_machine(), *_free_of_groups()) if value is not None]
    if not limits:  # macOS without its GPU
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    return max(0, min(limits)) + mx.get_cache_memory()


@functools.cache
def for_products() -> int:
    """Return the bytes of products that a step on a CPU may keep for its gradient, however large the batch.

    It is decided once a process, by the memory that is free then: results do not depend on it, plans of memory do.
    """
    return max(LEAST_KEPT, int(KEPT_SHARE * free())) // sharers


def total() -> int:
    """Return the bytes that there are for this process if nothing else runs: of the GPU, or of the machine."""
    if backend.IS_GPU:
        info = backend.device_info()
        return int(info.get("memory_size") or info.get("total_memory") or mx.get_memory_limit())
    whole = _meminfo("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([whole, *_limits_of_groups()])


def bound_cache(expected: int = 0) -> None:
    """On a GPU, bound mlx's cache of freed arrays by the most that was in use, and by the memory left beside that.

    Call it at the start, and after each chunk of work: the next one's arrays have other shapes, so mlx would cache more
    until all memory is taken (benchmarks/LOG.md). `prepare` bounds the cache of CPUs.

    Args:
        expected: bytes that are going to be in use.
    """
    if not backend.IS_GPU:
        return
    active = mx.get_active_memory()
    whole = active + free()
    used = max(active, backend.peak_memory(), expected)
    mx.set_cache_limit(int(max(LEAST_CACHE * whole, min(used, whole - used))))


def keep_resident() -> None:
    """On Metal, keep the memory in use resident, so that macOS 15 and later neither compress nor swap it."""
    if backend.IS_METAL:
        mx.set_wired_limit(int(backend.device_info()["max_recommended_working_set_size"]))


# --- of a Mac -------------------------------------------------------------------------------------------------------


def _unused_on_mac(info: dict) -> int | None:
    """Return the bytes of a Mac that no process uses, as macOS reports them; None if it reports nothing."""
    level = _memory_level() if backend.IS_METAL else None
    return None if level is None else info["memory_size"] * level // 100


def _memory_level() -> int | None:
    """Return macOS's `kern.memorystatus_level`, the per cent of memory that are free; None where there is none."""
    try:
        sysctl = ctypes.CDLL(None).sysctlbyname
    except (OSError, AttributeError, TypeError):  # TypeError: Windows
        return None
    level = ctypes.c_int(0)
    size = ctypes.c_size_t(ctypes.sizeof(level))
    failed = sysctl(b"kern.memorystatus_level", ctypes.byref(level), ctypes.byref(size), None, ctypes.c_size_t(0))
    return level.value if not failed and 0 <= level.value <= 100 else None


# --- of a Linux machine ---------------------------------------------------------------------------------------------


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
