"""Load the BLAS that mlx's matrix products use on Linux CPUs, before anything imports mlx.

mlx's wheel contains a reference BLAS of a few GFLOP/s. Its calls resolve to the library that is loaded first with
global symbols, so `load` loads a fast one: MKL on Intel's processors, OpenBLAS on others, where MKL uses older vector
instructions (benchmarks/LOG.md). This file must not import mlx.

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
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_retrieval.backend import cpu_kernels

# In PyPI's OpenBLAS every name has a prefix, against clashes; mlx calls these three names without it.
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
_set_threads: Callable[[int], None] | None = None  # of OpenBLAS; MKL uses TBB, whose threads share the cores


def load() -> str | None:
    """Load the fastest BLAS available, with global symbols. Return its name and processor type; None without one."""
    kinds = {"MKL": _load_mkl, "OpenBLAS": _load_openblas}
    preferred = os.environ.get("MLX_RETRIEVAL_BLAS") or ("MKL" if _vendor() == "GenuineIntel" else "OpenBLAS")
    for name in sorted(kinds, key=lambda name: name.lower() != preferred.lower()):
        if description := kinds[name]():
            return description
    return None


@contextmanager
def one_thread(side_by_side: int) -> Iterator[None]:
    """Let each matrix product use one thread where `side_by_side` worker threads, more than one, compute products.

    Otherwise OpenBLAS computes one product at a time, on all cores.
    """
    if _set_threads is None or side_by_side < 2:
        yield
        return
    _set_threads(1)
    try:
        yield
    finally:
        _set_threads(cores())


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _vendor() -> str:
    """Return the processor's vendor_id on Linux: GenuineIntel, AuthenticAMD; "" on Arm."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def _installed(package: str, file: str) -> str | None:
    """Return the path of a shared library in an installed PyPI package, without importing it; None if missing."""
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
        # MKL's default threads (OpenMP) spin while they wait and take the cores from everything else: a step beside
        # other work took up to ten times as long as with TBB, whose threads sleep.
        library.MKL_Set_Threading_Layer(4)
    return "MKL"


def _load_openblas() -> str | None:
    """Load OpenBLAS from PyPI, under the names that mlx calls (see `_shim`), or else the system's."""
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
    """Return a library that forwards the names that mlx calls; compiled once a user.

    None without a C++ compiler or space: a run says which BLAS it has, and why no kernel can be compiled.
    """
    with suppress(OSError):
        if (compiler := shutil.which("g++")) and (library := _compiled(compiler)):
            return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return None


def _compiled(compiler: str) -> Path | None:
    """Return the library of SHIM, compiled if it is not there yet. Raises OSError if there is no space."""
    folder = cpu_kernels.private_folder(f"{SHIM}{platform.machine()}")
    if folder is None:
        return None
    library = folder / "blas.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            source, output = Path(draft) / "blas.cpp", Path(draft) / "blas.so"
            source.write_text(f'extern "C" {{{SHIM}}}\n', encoding="utf-8")
            command = [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(output)]
            if subprocess.run(command, check=False, capture_output=True).returncode != 0:
                return None
            output.replace(library)  # another process never sees half a library
    return library
