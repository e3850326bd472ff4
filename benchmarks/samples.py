"""Where the time of a process goes, from samples of Linux's `perf`: shared by scripts here; not a command.

`perf` interrupts the process's threads some hundred times a second and notes which function of which library runs.
Kinds come from these names alone, so they are as fine as the names: mlx names a fused kernel by its operations, and
torch, whose library contains MKL, a loop by its function.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

FREQUENCY = 499  # samples a second; not a divisor of anything that happens regularly
# What runs, by patterns for the library and the function: the first that fits.
KINDS = (
    ("products: packing of the factors", r"mkl|openblas|blas\.so|libtorch", r"(mkl|omp_parallel).*(?<!no)copy"),
    ("products: packing of the factors", r"mkl|openblas|blas\.so", r"(?<!no)copy"),
    ("products", r"mkl_(avx|core|intel|rt|def)|openblas|blas\.so", r""),
    ("products", r"libtorch|JIT", r"mkl_|^0x"),
    ("threads that wait for work", r"tbb|mkl_tbb|gomp", r""),
    ("threads that wait for work", r"", r"sched|yield|futex|finish_task_switch|_raw_spin|irqentry|clock_gettime"),
    ("fused: exponentials of attention", r"^lib.*_(contiguous|strided)", r"Exp"),
    ("fused: activation", r"^lib.*_(contiguous|strided)", r"Erf|Tanh|Sigmoid"),
    ("fused: norms", r"^lib.*_(contiguous|strided)", r"Rsqrt"),
    ("fused: the rest", r"^lib.*_(contiguous|strided)|^lib[A-Z]", r""),
    ("fused: exponentials of attention", r"libtorch", r"flash|[Ss]oftmax"),
    ("fused: activation", r"libtorch", r"[Gg]elu"),
    ("fused: norms", r"libtorch", r"LayerNorm|Moments"),
    ("copies", r"libmlx|libtorch", r"(?<!no)copy"),
    ("copies", r"libc\.", r"mem(move|cpy)"),
    ("reductions", r"libmlx", r"reduc"),
    ("element by element, not fused", r"libmlx|libtorch", r"(unary|binary|ternary)_op|callback_fn"),
    ("tokenizer", r"tokenizers", r""),
    ("memory: allocation and pages", r"libc|kernel", r"alloc|free|page|fault|clear|memset|unlink_chunk"),
    ("memory: allocation and pages", r"libmlx", r"llocator"),
    ("Python, graphs and the rest", r"", r""),
)


def kind(library: str, function: str) -> str:
    """Return the kind of work that a function of a library does."""
    return next(name for name, of, like in KINDS if re.search(of, library) and re.search(like, function))


def by_kind(lines: Iterable[str]) -> Counter[str]:
    """Return the share of the samples of each kind, from lines of `perf report`: percent, library, function."""
    shares: Counter[str] = Counter()
    for line in lines:
        if found := re.match(r"\s*([\d.]+)%\s+(\S+|\[JIT\] tid \d+)\s+\[[^\]]*\]\s+(.*?)\s*$", line):
            shares[kind(found[2], found[3])] += float(found[1]) / 100
    return shares


@contextmanager
def sampled() -> Iterator[Counter[str]]:
    """Sample this process meanwhile. The counter that this gives is filled at the end.

    Raises SystemExit where there is no `perf`, or it may not look.
    """
    if shutil.which("perf") is None:
        raise SystemExit("error: --profile needs perf (on Debian: apt-get install linux-perf)")
    shares: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "perf.data"
        command = ["perf", "record", "-e", "cpu-clock", "-F", str(FREQUENCY), "-p", str(os.getpid()), "-o", str(data)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as perf:
            try:
                yield shares
            finally:
                perf.send_signal(signal.SIGINT)
                _, errors = perf.communicate()
        command = ["perf", "report", "-i", str(data), "--stdio", "-g", "none", "--sort", "dso,symbol", "--no-children"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        shares.update(by_kind(done.stdout.splitlines()))
    if not shares:
        raise SystemExit(f"error: perf saw nothing: {errors.strip() or done.stderr.strip()}")


def profile(work: Callable[[], object]) -> tuple[Counter[str], float]:
    """Return the seconds of a core that `work()` takes, by kind, and the share of all cores that was busy meanwhile."""
    began, used = time.perf_counter(), time.process_time()
    with sampled() as shares:
        work()
    wall, used = time.perf_counter() - began, time.process_time() - used
    busy = used / wall / len(os.sched_getaffinity(0))
    return Counter({kind: share * used for kind, share in shares.items()}), busy
