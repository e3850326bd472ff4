"""The BLAS is there before mlx, its threads give the same bits every time, and memory is not hoarded.

python -m pytest tests/test_backend.py
"""

import sys

import backend
from backend import mx

import numpy as np
import pytest

linux_cpu = pytest.mark.skipif(sys.platform != "linux" or backend.IS_GPU, reason="about BLAS on Linux CPUs")


@linux_cpu
def test_a_fast_blas_is_loaded_and_said(run_python):
    done = run_python("import backend; print(backend.describe())")
    assert done.returncode == 0 and f"BLAS {backend.BLAS}" in done.stdout and backend.BLAS


@linux_cpu
def test_without_a_blas_there_is_a_warning_and_no_failure(run_python):
    code = (
        "import ctypes.util, importlib.metadata as m; real = m.files\n"
        "m.files = lambda name: [] if name == 'mkl' else real(name)\n"
        "ctypes.util.find_library = lambda name: None\n"
        "import backend; print(backend.describe(), (backend.mx.ones((2, 2)) @ backend.mx.ones((2, 2))).sum().item())"
    )
    done = run_python(code)
    assert done.returncode == 0 and "reference (slow)" in done.stdout and "8.0" in done.stdout
    assert "no fast BLAS found" in done.stderr


@linux_cpu
def test_importing_mlx_first_is_told(run_python):
    done = run_python("import mlx.core, backend; print(backend.BLAS)")
    assert done.returncode == 0 and "mlx was imported before backend" in done.stderr and "None" in done.stdout


@linux_cpu
def test_mkl_s_threads_do_not_spin(run_python):
    """MKL waits with TBB, not OpenMP, unless the user says otherwise; children inherit nothing."""
    if backend.BLAS != "MKL":
        pytest.skip("no MKL here")
    code = (
        "import os, backend; from backend import mx\n"
        "a = mx.ones((512, 512)); mx.eval(a @ a); maps = open('/proc/self/maps').read()\n"
        "print('tbb_thread' in maps, 'intel_thread' in maps, 'MKL_THREADING_LAYER' in os.environ)"
    )
    assert run_python(code).stdout.split() == ["True", "False", "False"]


def test_matrix_products_are_the_same_bits_every_time():
    """Resuming bit for bit rests on it; shapes as in LoRA's forward and backward passes."""
    rng = np.random.default_rng(0)
    for m, k, n in [(2048, 384, 16), (384, 2048, 16), (16, 2048, 384), (64, 10_000, 64), (512, 384, 1536)]:
        a, b = (mx.array(rng.standard_normal(shape, dtype=np.float32)) for shape in ((m, k), (k, n)))
        assert len({np.array(a @ b).tobytes() for _ in range(10)}) == 1


def test_freed_arrays_are_not_hoarded():
    """Regression: the cache of freed arrays grew to 4 GB over a few dozen steps of varying shapes."""
    if backend.IS_GPU:
        pytest.skip("mlx's own limit holds on GPUs")
    for length in range(200, 260):
        mx.eval(mx.ones((length, 64, 1024)) + 1)
    assert mx.get_cache_memory() <= 256 << 20


def test_dtype_is_float32_on_cpus_and_the_checkpoint_s_on_gpus():
    assert backend.default_dtype(mx.bfloat16) == (mx.bfloat16 if backend.IS_GPU else mx.float32)
