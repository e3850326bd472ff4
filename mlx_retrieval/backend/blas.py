"""The BLAS that mlx's matrix products run on, on Linux CPUs. Called by backend.py before anything imports mlx.

mlx's wheel carries a reference BLAS of a few GFLOP/s. Its calls resolve to whichever library is loaded first with
global symbols, so `load` does that with a fast one: Intel's on Intel's processors, OpenBLAS elsewhere, where Intel's
computes with the vectors of ten years ago (benchmarks/LOG.md). It imports no mlx, and of the toolkit only kernels.py.

`MLX_RETRIEVAL_BLAS=MKL` or `OpenBLAS` in the environment overrides the choice.
"""

import ctypes
import ctypes.util
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_retrieval.backend import cpu_kernels

# PyPI's OpenBLAS has a prefix before every name, so that it disturbs no other; mlx calls these three without.
SHIM = "".join(
    f"""
void (*{kind}_to)(int, int, int, int, int, int, {scalar}, const void*, int, const void*, int, {scalar}, void*, int);
void cblas_{kind}(int order, int ta, int tb, int m, int n, int k, {scalar} alpha, const void* a, int lda,
                  const void* b, int ldb, {scalar} beta, void* c, int ldc) {{
  {kind}_to(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}}
"""
    for kind, scalar in (("sgemm", "float"), ("dgemm", "double"), ("cgemm", "const void*"))
)
_set_threads: Callable[[int], None] | None = None  # of OpenBLAS; MKL's threads are TBB's, which share the cores anyway


def load() -> str | None:
    """Load the best BLAS there is with global symbols. Its name and whose vectors it uses, None where there is none."""
    kinds = {"MKL": _load_mkl, "OpenBLAS": _load_openblas}
    wanted = os.environ.get("MLX_RETRIEVAL_BLAS") or ("MKL" if _vendor() == "GenuineIntel" else "OpenBLAS")
    for name in sorted(kinds, key=lambda name: name.lower() != wanted.lower()):
        if loaded := kinds[name]():
            return loaded
    return None


@contextmanager
def one_thread() -> Iterator[None]:
    """While several threads compute products side by side, each product stays on its own: OpenBLAS would let only one
    of them at a time compute, on all cores."""
    if _set_threads is None:
        yield
        return
    _set_threads(1)
    try:
        yield
    finally:
        _set_threads(cores())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _vendor() -> str:
    """The processor's maker as Linux calls it: GenuineIntel, AuthenticAMD; empty on Arm."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def _installed(package: str, file: str) -> str | None:
    """Path of a shared library that a PyPI package brought, without importing anything."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(Path(f.locate()).resolve()) for f in files if f.name.startswith(file)), None)


def _load_mkl() -> str | None:
    if (path := _installed("mkl", "libmkl_rt.so")) is None:
        return None
    tbb = _installed("tbb", "libtbb.so.12") if "MKL_THREADING_LAYER" not in os.environ else None
    if tbb:
        ctypes.CDLL(tbb, mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    if tbb:
        # MKL's default threads (OpenMP) spin while they wait and take the cores from everything else that runs: a
        # step beside other work took up to ten times as long as with TBB, whose threads sleep.
        library.MKL_Set_Threading_Layer(4)
    return "MKL"


def _load_openblas() -> str | None:
    """PyPI's, with the names that mlx calls put before it by a few compiled lines; else the system's."""
    global _set_threads
    if (path := _installed("scipy-openblas32", "libscipy_openblas.so")) and (shim := _shim()):
        library, prefix = ctypes.CDLL(path), "scipy_"
        for kind in ("sgemm", "dgemm", "cgemm"):
            address = ctypes.cast(getattr(library, f"scipy_cblas_{kind}"), ctypes.c_void_p).value
            ctypes.c_void_p.in_dll(shim, f"{kind}_to").value = address
    elif name := ctypes.util.find_library("openblas"):
        library, prefix = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL), ""
    else:
        return None
    _set_threads = getattr(library, f"{prefix}openblas_set_num_threads")
    _set_threads(cores())
    core = getattr(library, f"{prefix}openblas_get_corename")
    core.restype = ctypes.c_char_p
    return f"OpenBLAS for {core().decode()}"


def _shim() -> ctypes.CDLL | None:
    """The names that mlx calls, as a library: compiled once and kept; None where nothing can compile it."""
    compiler = shutil.which("g++")
    folder = cpu_kernels.private_folder(f"{SHIM}{platform.machine()}") if compiler else None
    if folder is None:
        return None
    library = folder / "blas.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            source, made = Path(draft) / "blas.cpp", Path(draft) / "blas.so"
            source.write_text(f'extern "C" {{{SHIM}}}\n', encoding="utf-8")
            command = [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(made)]
            if subprocess.run(command, check=False, capture_output=True).returncode != 0:
                return None
            made.replace(library)  # another process never sees half a library
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
