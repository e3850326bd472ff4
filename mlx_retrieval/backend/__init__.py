"""Choose the BLAS, device, dtype and batch shapes of this machine. Import it before any `mlx` module.

On Linux CPUs the mlx wheel contains a reference BLAS of a few GFLOP/s. A fast one, loaded with global symbols before
`mlx.core`, makes float32 matrix products about thirty times faster. Importing this module loads it, and changes nothing
else in the process. On macOS and CUDA there is nothing to load.

    python -c "from mlx_retrieval import backend; backend.prepare(); print(backend.describe())"

`prepare` sets up the process for speed and exact float32. Commands call it first; a notebook may. Without it, results
are the same up to rounding, and slower on CPUs.

`MLX_RETRIEVAL_PLAIN=1` in the environment turns off the optimisations for CPUs beyond the BLAS (vectorised kernels,
compiled passes, worker threads, merged weights), for comparison. Losses and vectors are the same up to rounding.

`MLX_RETRIEVAL_AS=metal` takes the path of a Mac with `MLX_RETRIEVAL_MEMORY` GB (16 by default) on any machine, which is
meant for tests: see as_metal.py. `MLX_RETRIEVAL_AS=cpu` computes on the CPU of a machine with a GPU.
"""

import ctypes
import functools
import importlib.metadata
import os
import platform
import shutil
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from mlx_retrieval.backend import blas, cpu_kernels


def _load_blas() -> str | None:
    """Load a fast BLAS, so that mlx's calls resolve to it. Return its name; warn and return None if that fails."""
    if "mlx.core" in sys.modules:
        warnings.warn("mlx was imported before backend: a fast BLAS can no longer be loaded", stacklevel=3)
        return None
    if (name := blas.load()) is None:
        warnings.warn(
            "no fast BLAS found: matrix products will be about 30 times slower than necessary "
            "(pip install mkl, or install the system's OpenBLAS)",
            stacklevel=3,
        )
    return name


def _refuse(reason: str) -> NoReturn:
    """End the process because of a variable's value, as commands do for bad input."""
    print(reason, file=sys.stderr)
    raise SystemExit(2)


def _has_cuda_wheel() -> bool:
    names = (dist.name or "" for dist in importlib.metadata.distributions())
    return any(name.startswith("mlx-cuda") for name in names)


PLAIN = os.environ.get("MLX_RETRIEVAL_PLAIN", "0") not in ("", "0")
AS = os.environ.get("MLX_RETRIEVAL_AS", "")
if AS not in ("", "metal", "cpu"):
    _refuse(f"MLX_RETRIEVAL_AS={AS}: neither metal nor cpu")
IS_LINUX_CPU = platform.system() == "Linux" and not _has_cuda_wheel()
BLAS = _load_blas() if IS_LINUX_CPU else None
KERNELS = False  # whether g++ vectorises the kernels that `mx.compile` writes: see `prepare`

from mlx_retrieval.backend import as_metal  # noqa: E402

import mlx.core as mx  # noqa: E402  (the BLAS has to be there first)
import mlx.nn as nn  # noqa: E402, F401  (other modules write `from mlx_retrieval.backend import mx, nn`)

if AS == "cpu":
    mx.set_default_device(mx.cpu)
# Whether this process only takes the path of a Mac, on another machine: a mode for tests.
AS_METAL = AS == "metal" and not mx.metal.is_available()
if AS_METAL:
    try:
        as_metal.memory()
    except ValueError as error:
        _refuse(str(error))
    as_metal.install()
IS_GPU = AS_METAL or mx.default_device() == mx.Device(mx.gpu)
IS_CUDA = IS_GPU and platform.system() == "Linux" and not AS_METAL
IS_METAL = IS_GPU and not IS_CUDA

# Whether functions are written for `mx.compile` to fuse, adapters merged and worker threads used: pays on CPUs only.
FUSED = not IS_GPU and not PLAIN
# Whether passes are compiled, unless --compile says otherwise. On GPUs that has not been measured.
COMPILED = FUSED
COMPILE = ("auto", "on", "off")
# Micro-batches computed at the same time, each on its own thread: element-wise functions use one core each. One thread
# more than there are cores fills the moments in which another waits for its next operation.
WORKERS = min(len(os.sched_getaffinity(0)) + 1, 5) if FUSED and hasattr(os, "sched_getaffinity") else 1
# Tokens (rows x padded length) that go through the backbone at once, unless --micro-batch-tokens says otherwise.
GPU_TOKENS = 16_384
MICRO_BATCH_TOKENS = GPU_TOKENS if IS_GPU else 1_024 if FUSED else 2_048
# The cost of one more micro-batch, in tokens: saving less padding than this does not pay. MiniLM on a CPU: about 30,
# and more with smaller layers, see `batching.cpu_overhead`. On an H100, where launches cost time and few tokens leave
# most of the card idle, 17 of them took twice as long as 6. Metal: an estimate from the number of launches, until
# somebody measures it.
CPU_OVERHEAD, CUDA_OVERHEAD, METAL_OVERHEAD = 32, 2_048, 512
MICRO_BATCH_OVERHEAD = CUDA_OVERHEAD if IS_CUDA else METAL_OVERHEAD if IS_METAL else CPU_OVERHEAD
# Padded lengths are rounded up to a multiple of this: GPUs reuse kernels of equal shapes, compiled passes graphs.
GPU_GRID = 16
LENGTH_GRID = GPU_GRID if IS_GPU else 4 if FUSED else 1
# Of freed arrays that mlx keeps for reuse on CPUs.
CACHE_BYTES = 256 << 20
# How CPUs compute with quantised weights (backbones/dequantized.py), and which of these holds: see `set_dequantize`.
DEQUANTIZE = ("auto", "on", "blocks", "off")
DEQUANTIZED = "auto"
# The dtypes to compute in: see `compute_dtype`.
DTYPES = ("auto", "float32", "bfloat16", "float16")


@functools.cache
def prepare() -> None:
    """Set up this process for speed and exact float32. Call it before the first computation; later calls do nothing.

    - `MLX_ENABLE_TF32=0` unless it is set: on GPUs with TF32, mlx otherwise rounds the factors of float32 products to
      10 bits. mlx reads the variable only once, at its first product.
    - `TOKENIZERS_PARALLELISM=true` unless it is set: tokenizers works on all cores after a fork, too.
    - On CPUs, the memory that mlx keeps for reuse is limited to 256 MB; without a limit it grew to gigabytes.
    - On Linux CPUs, malloc keeps freed memory, and `PATH` and `TMPDIR` lead mlx to a g++ that vectorises its kernels
      (cpu_kernels.py).
    """
    global KERNELS
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not IS_GPU:
        mx.set_cache_limit(CACHE_BYTES)
    if IS_LINUX_CPU:
        _tune_malloc()
        KERNELS = not PLAIN and cpu_kernels.install()


def compile_ahead() -> None:
    """On a Linux CPU that has no kernels yet, compile those of the default model meanwhile. After `prepare`."""
    if KERNELS:
        cpu_kernels.compile_ahead(Path(mx.__file__).parent / "include", mx.__version__)


def _tune_malloc() -> None:
    """Keep freed arrays in the process: returning them to the system costs page faults at every step (glibc only)."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # musl and other C libraries have no mallopt
        return
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    libc.mallopt(m_arena_max, 1)  # other arenas return memory regardless of the threshold
    libc.mallopt(m_mmap_threshold, 32 << 20)
    libc.mallopt(m_trim_threshold, 1 << 30)


def compute_dtype(checkpoint: mx.Dtype, wanted: str = "auto") -> mx.Dtype:
    """Return the dtype to compute in.

    Args:
        checkpoint: the dtype of the model's files.
        wanted: one of DTYPES; auto = the checkpoint's on a GPU, float32 on CPUs, where bfloat16 is 40 times slower.
    """
    if wanted == "auto":
        return checkpoint if IS_GPU else mx.float32
    return getattr(mx, wanted)


def compiles(wanted: str = "auto") -> bool:
    """Return whether passes are compiled; `wanted`: one of COMPILE, auto = as `set_compile` says, else on CPUs only."""
    return COMPILED if wanted == "auto" else wanted == "on"


def set_compile(wanted: str) -> None:
    """Compile the passes of models that are loaded from now on, or do not; `wanted`: one of COMPILE, auto = no change.

    The commands for inference call it; a notebook may. Training has a setting of its own, `Settings.compile`.
    """
    global COMPILED
    COMPILED = compiles(wanted)


def set_dequantize(wanted: str) -> None:
    """Say how models that are loaded from now on compute with quantised weights on CPUs; `wanted`: one of DEQUANTIZE.

    The commands for inference call it; a notebook may. Training has a setting of its own, `Settings.dequantize`.
    """
    global DEQUANTIZED
    DEQUANTIZED = wanted


def device_info() -> dict[str, str | int]:
    """Return what mlx knows of the device: `device_name`, on GPUs `memory_size` and more; see `mx.device_info`."""
    return as_metal.device_info() if AS_METAL else mx.device_info()


def device_name() -> str:
    """Return the device's name, for instance `Apple M3 Max GPU` or `Intel(R) Xeon(R) Processor CPU`."""
    return f"{device_info().get('device_name', 'unknown')} {'GPU' if IS_GPU else 'CPU'}"


def describe() -> str:
    """Return one line for the top of every run: mlx's version, device, BLAS, cores, missing kernels."""
    parts = [f"mlx {importlib.metadata.version('mlx')}", device_name()]
    if not IS_GPU and platform.system() == "Linux":
        parts.append(f"BLAS {BLAS or 'reference (slow)'}")
        parts.append(f"{blas.cores()} cores")
        if not KERNELS:
            parts.append("kernels not vectorised" + ("" if shutil.which("g++") else " (no g++)"))
    return ", ".join(parts)


def peak_memory() -> int:
    """Return the peak of bytes in mlx arrays since the start or the last `mx.reset_peak_memory()`."""
    return mx.get_peak_memory()
