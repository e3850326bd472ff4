"""The BLAS is there before mlx, its threads give the same bits every time, and memory is not hoarded.

python -m pytest tests/backend/test_backend.py
"""

import errno
import os
import sys

from mlx_retrieval.backend import blas, cpu_kernels, mx

import numpy as np
import pytest

from mlx_retrieval import backend

linux_cpu = pytest.mark.skipif(sys.platform != "linux" or backend.IS_GPU, reason="about BLAS on Linux CPUs")


@linux_cpu
def test_a_fast_blas_is_loaded_and_said(run_python):
    done = run_python("from mlx_retrieval import backend; print(backend.describe())")
    assert done.returncode == 0 and f"BLAS {backend.BLAS}" in done.stdout and backend.BLAS


@linux_cpu
def test_without_a_blas_there_is_a_warning_and_no_failure(run_python):
    code = (
        "import ctypes.util, importlib.metadata as m; real = m.files\n"
        "m.files = lambda name: [] if name in ('mkl', 'scipy-openblas32') else real(name)\n"
        "ctypes.util.find_library = lambda name: None\n"
        "from mlx_retrieval import backend\n"
        "print(backend.describe(), (backend.mx.ones((2, 2)) @ backend.mx.ones((2, 2))).sum().item())"
    )
    done = run_python(code)
    assert done.returncode == 0 and "reference (slow)" in done.stdout and "8.0" in done.stdout
    assert "no fast BLAS found" in done.stderr


@linux_cpu
@pytest.mark.parametrize("name", ["MKL", "OpenBLAS"])
def test_either_blas_can_be_asked_for_and_computes(monkeypatch, run_python, name):
    """Every kind of product that mlx hands to a BLAS, also from threads side by side, against float64."""
    monkeypatch.setenv("MLX_RETRIEVAL_BLAS", name)
    code = (
        "import threading, numpy as np; from mlx_retrieval import backend; from mlx_retrieval.backend import blas, mx\n"
        "a, b = np.random.default_rng(0).standard_normal((2, 300, 300)); expected = a @ b; wrong = []\n"
        "def products():\n"
        "    with mx.stream(mx.new_stream(mx.cpu)):\n"
        "        for kind in (mx.float32, mx.float64, mx.complex64):\n"
        "            found = np.array(mx.array(a, kind) @ mx.array(b, kind).T.T)\n"
        "            wrong.append(np.abs(found - expected).max() > 1e-4)\n"
        "    mx.clear_streams()\n"
        "for side_by_side in (1, 3):\n"
        "    threads = [threading.Thread(target=products) for _ in range(side_by_side)]\n"
        "    with blas.one_thread(side_by_side):\n"
        "        for thread in threads: thread.start()\n"
        "        for thread in threads: thread.join()\n"
        "print(backend.BLAS, len(wrong), any(wrong))"
    )
    done = run_python(code)
    if name not in done.stdout:
        pytest.skip(f"no {name} here")
    assert done.returncode == 0 and done.stdout.split()[-2:] == ["12", "False"], done.stderr


@linux_cpu
def test_openblas_computes_on_all_cores_but_where_threads_do_side_by_side(monkeypatch, run_python):
    monkeypatch.setenv("MLX_RETRIEVAL_BLAS", "OpenBLAS")
    code = (
        "import ctypes; from mlx_retrieval import backend; from mlx_retrieval.backend import blas\n"
        "path = blas._installed('scipy-openblas32', 'libscipy_openblas.so')\n"
        "count = ctypes.CDLL(path).scipy_openblas_get_num_threads if path else blas.cores\n"
        "before = count()\n"
        "with blas.one_thread(1): alone = count()\n"
        "with blas.one_thread(2): within = count()\n"
        "print(before == count() == alone == blas.cores(), within, path is None)"
    )
    done = run_python(code)
    if done.stdout.endswith("True\n"):
        pytest.skip("PyPI's OpenBLAS is not installed")
    assert done.stdout.split() == ["True", "1", "False"], done.stderr


@linux_cpu
def test_without_space_it_is_another_blas(monkeypatch):
    """Regression: importing the toolkit ended in a traceback."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cpu_kernels, "private_folder", full)
    assert blas._shim() is None


@linux_cpu
def test_without_a_compiler_it_is_another_blas(monkeypatch, run_python, tmp_path):
    """PyPI's OpenBLAS needs a few compiled lines, which are kept."""
    monkeypatch.setenv("MLX_RETRIEVAL_BLAS", "OpenBLAS")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = "from mlx_retrieval import backend; print(backend.BLAS)"
    compiled = run_python(code).stdout
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "OpenBLAS" not in run_python(code).stdout
    if "OpenBLAS" not in compiled:
        pytest.skip("no OpenBLAS here")
    assert len(list(tmp_path.rglob("blas.so"))) == 1


@linux_cpu
def test_importing_mlx_first_is_told(run_python):
    done = run_python("import mlx.core; from mlx_retrieval import backend; print(backend.BLAS)")
    assert done.returncode == 0 and "mlx was imported before backend" in done.stderr and "None" in done.stdout


@linux_cpu
def test_mkl_s_threads_do_not_spin(monkeypatch, run_python):
    """MKL waits with TBB, not OpenMP, unless the user says otherwise; children inherit nothing."""
    monkeypatch.setenv("MLX_RETRIEVAL_BLAS", "MKL")
    code = (
        "import os; from mlx_retrieval import backend; from mlx_retrieval.backend import mx\n"
        "a = mx.ones((512, 512)); mx.eval(a @ a); maps = open('/proc/self/maps').read()\n"
        "print('tbb_thread' in maps, 'intel_thread' in maps, 'MKL_THREADING_LAYER' in os.environ)"
    )
    code += "; print(backend.BLAS)"
    *found, name = run_python(code).stdout.split()
    if name != "MKL":
        pytest.skip("no MKL here")
    assert found == ["True", "False", "False"]


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
    assert backend.compute_dtype(mx.bfloat16) == (mx.bfloat16 if backend.IS_GPU else mx.float32)


SNAPSHOT = """
import gc, logging, os, signal, sys, tempfile, threading, warnings
import numpy  # which does what is forbidden here
events = []
def watch(name, arguments):
    if name in ("os.putenv", "os.unsetenv", "os.chdir", "signal.signal") or name.startswith("gc."):
        events.append((name, str(arguments)))
    if name in ("ctypes.dlopen", "ctypes.dlsym"):
        events.append((name, str(arguments[-1])))
def state():
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)}
    return {
        "environment": dict(os.environ), "path": list(sys.path), "finders": list(sys.meta_path),
        "path hooks": list(sys.path_hooks), "signals": signals, "folder": os.getcwd(), "mask": os.umask(0o22),
        "garbage": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()), "warnings": len(warnings.filters),
        "log handlers": list(logging.getLogger().handlers), "log level": logging.getLogger().level,
        "temporary files": tempfile.gettempdir(), "hooks": (sys.excepthook, sys.displayhook, threading.excepthook),
        "recursion": sys.getrecursionlimit(), "threads": threading.active_count(),
    }
"""


@pytest.fixture
def unprepared(monkeypatch) -> None:
    """Children do not inherit what `backend.prepare` did to this process."""
    for name in ("MLX_ENABLE_TF32", "TOKENIZERS_PARALLELISM", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    folders = os.environ["PATH"].split(os.pathsep)
    monkeypatch.setenv("PATH", os.pathsep.join(folder for folder in folders if cpu_kernels.FOLDER not in folder))


@pytest.mark.parametrize("what", ["embed", "every module"])
def test_importing_changes_nothing_in_the_process(unprepared, run_python, what):
    """Regression: `from embed import load` replaced PATH and TMPDIR, called mallopt, and put stand-ins for torch and
    wandb into sys.modules, which ended notebooks' processes."""
    importing = "import embed" if what == "embed" else (
        "import importlib, pkgutil, mlx_retrieval, data_loader, loss\n"
        "import train, eval, embed, rerank, search, serve, mine, export, adapt, mlx_cross_encoder\n"
        "for module in pkgutil.walk_packages(mlx_retrieval.__path__, 'mlx_retrieval.'):\n"
        # Its classes derive from mteb's, so mteb_results.py imports it where mteb is wanted, and nothing else does.
        "    if module.name != 'mlx_retrieval.evaluation.mteb_models':\n"
        "        importlib.import_module(module.name)"
    )  # fmt: skip
    code = (
        f"{SNAPSHOT}\nbefore, modules = state(), dict(sys.modules); sys.addaudithook(watch)\n{importing}\n"
        "seen = list(events); after = state()\n"
        "replaced = [name for name, module in modules.items() if sys.modules.get(name) is not module]\n"
        "strange = [n for n, m in sys.modules.items() if n.split('.')[0] in ('torch', 'wandb') or m is None]\n"
        "print([key for key in before if before[key] != after[key]], replaced, strange)\n"
        "print([event for event in seen if not event[0].startswith('ctypes')])\n"
        "print('mallopt' in str(seen))"
    )
    done = run_python(code)
    assert done.stdout.splitlines() == ["[] [] []", "[]", "False"], done.stdout + done.stderr


def test_prepare_sets_up_the_process_once(unprepared, monkeypatch, run_python):
    for name in ("MLX_ENABLE_TF32", "TOKENIZERS_PARALLELISM", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(
        "PATH", os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if cpu_kernels.FOLDER not in p)
    )
    code = (
        "import os, sys; from mlx_retrieval import backend; names = set(sys.modules); path = os.environ['PATH']\n"
        "for _ in range(2): backend.prepare()\n"
        "print(os.environ['MLX_ENABLE_TF32'], os.environ['TOKENIZERS_PARALLELISM'])\n"
        "print(backend.KERNELS == (os.environ['PATH'].count('mlx-retrieval-kernels') == 1))\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'wandb', 'transformers')])"
    )
    assert run_python(code).stdout.splitlines() == ["0 true", "True", "[]"]
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    assert run_python(code).stdout.splitlines()[0] == "1 true"


@pytest.mark.slow
def test_without_prepare_vectors_are_the_same(unprepared, run_python):
    """A notebook need not call it, and need not have a compiler either: the same up to rounding."""
    code = (
        "import os, sys; from embed import load; from mlx_retrieval import backend\n"
        "if 'prepare' in sys.argv: backend.prepare()\n"
        "if 'no compiler' in sys.argv: os.environ['PATH'] = ''\n"
        "vectors = load('gemma-3-tiny-mlx').encode(['a kidney stone', 'the cat sat on the mat'] * 2)\n"
        "print(backend.KERNELS); print(*vectors.ravel().tolist())"
    )
    found = {}
    for how in ("prepare", "", "no compiler"):
        kernels, vectors = run_python(code, how).stdout.splitlines()
        assert kernels == str(how == "prepare" and backend.KERNELS)
        found[how] = np.array(vectors.split(), dtype=np.float32)
    for how in ("", "no compiler"):
        np.testing.assert_allclose(found[how], found["prepare"], atol=2e-6)
