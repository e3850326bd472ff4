"""Measure how the toolkit works on this Mac, in under three minutes, and print one block to paste into an issue.

python tools/mac_check.py                      the tiny model of the toolkit, no download
python tools/mac_check.py --model sentence-transformers/all-MiniLM-L6-v2
python tools/mac_check.py --steps 3 --tries 2  a look at the block

The block has versions, the device, 20 steps of the default run in bfloat16 and float32, how near vectors are to
float32's, tokens a second for micro-batches planned with several overheads, and memory. Nothing is written. The project
was made without a Mac at hand (docs/backends.md), so every block helps. Ctrl-C prints what was measured so far.

It runs on other machines as well; with MLX_RETRIEVAL_AS=metal a CPU takes the path of a Mac.

Exit codes: 0 everything was measured, 1 something failed, and the block says what.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import io
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))

from mlx_retrieval.backend import device_memory, mx

import numpy as np

from mlx_retrieval import backend
from mlx_retrieval.inference.embedder import load
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.run import prepare

MODEL, DATA, CORPUS = CHECKOUT / "gemma-3-tiny-mlx", CHECKOUT / "train-data.jsonl", CHECKOUT / "eval-data/corpus.jsonl"
PACKAGES = ("mlx", "mlx-lm", "mlx-data", "numpy", "transformers", "tokenizers")
OVERHEADS = (32, 256, 512, 1_024)
START = time.perf_counter()
# After so many seconds a measurement takes no further step: in each dtype, and with each overhead.
SECONDS, SECONDS_OF_OVERHEAD = 30, 8
LAST = 5  # steps whose mean loss is shown
GB = 1 << 30  # as macOS counts memory


@dataclass
class Steps:
    """Steps of a run as they were measured; bytes are those in mlx's arrays."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    padding: list[float] = field(default_factory=list)
    micro_batches: list[int] = field(default_factory=list)
    peak: int = 0
    kept: int = 0  # freed, and kept for reuse

    @property
    def speed(self) -> float:
        """Tokens a second, without padding and without the first step, which loads kernels or compiles."""
        return sum(self.tokens[1:]) / sum(self.seconds[1:])


def take_steps(args: argparse.Namespace, count: int, most: float, **changes) -> Steps:
    """Take `count` steps of the default run with some settings changed; fewer, but two, if they last `most` seconds."""
    gc.collect()
    mx.clear_cache()
    chosen = {"model": str(args.model), "data": [str(DATA)], "batch_size": args.batch_size, "eval_tasks": []}
    trainer = prepare(Settings(**chosen | {"steps": count, "save_steps": 0} | changes)).trainer
    mx.reset_peak_memory()
    steps, start = Steps(), time.perf_counter()
    with contextlib.closing(trainer.batches.stream(0, count)) as stream:
        for step, batch in enumerate(stream, start=1):
            began = time.perf_counter()
            record = trainer.update(batch, step)
            steps.seconds.append(time.perf_counter() - began)
            steps.losses.append(record["loss"])
            for name in ("tokens", "padding", "micro_batches"):
                getattr(steps, name).append(record[name])
            if step > 1 and time.perf_counter() - start > most:
                break
    steps.peak, steps.kept = backend.peak_memory(), mx.get_cache_memory()
    return steps


def encode(args: argparse.Namespace, texts: list[str], dtype: str, device: mx.Device | None = None) -> np.ndarray:
    """Return (N, D) unit vectors of documents, computed on a device; None = this machine's."""
    here = mx.default_device()
    mx.set_default_device(device or here)
    try:
        return load(args.model, dtype=dtype).encode(texts, prompt="document", show_progress=False)
    finally:
        mx.set_default_device(here)


# --- sections of the block --------------------------------------------------------------------------------------------


def versions(args: argparse.Namespace) -> Iterator[str]:
    """The toolkit, the system, and the packages that compute."""
    command = ["git", "-C", str(CHECKOUT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    macos = platform.mac_ver()[0]
    system = f"macOS {macos}" if macos else f"{platform.system()} {platform.release()}"
    yield f"mlx-retrieval {commit or 'of unknown commit'}, {time.strftime('%Y-%m-%d')}"
    yield f"{system}, {platform.machine()}, Python {platform.python_version()}"
    yield ", ".join(f"{name} {version(name)}" for name in PACKAGES)


def version(package: str) -> str:
    """Return a package's version; "none" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def device(args: argparse.Namespace) -> Iterator[str]:
    """The device as mlx sees it."""
    yield backend.describe()
    for name, value in backend.device_info().items():
        large = isinstance(value, int) and value >= GB / 10
        yield f"  {name} {f'{value / GB:.1f} GB' if large else value}"
    yield f"  free {device_memory.free() / GB:.1f} GB"
    environment = {name: value for name, value in os.environ.items() if name.startswith(("MLX_", "METAL_"))}
    yield "  environment " + (", ".join(f"{name}={value}" for name, value in sorted(environment.items())) or "empty")


def training(args: argparse.Namespace) -> Iterator[str]:
    """The default run in bfloat16 and in float32: they should learn alike."""
    last = f"last {min(LAST, args.steps)}"
    yield f"{'':10}{'loss 1':>9}{last:>9}{'step 1 s':>10}{'tokens/s':>10}{'steps':>7}{'peak GB':>9}{'kept GB':>9}"
    for dtype in ("bfloat16", "float32") if backend.IS_GPU else ("float32",):  # on CPUs bfloat16 is 40 times slower
        show(f"steps in {dtype}")
        steps = take_steps(args, args.steps, SECONDS, dtype=dtype)
        late = statistics.fmean(steps.losses[-LAST:])
        yield (
            f"{dtype:10}{steps.losses[0]:9.4f}{late:9.4f}{steps.seconds[0]:10.2f}{steps.speed:10,.0f}"
            f"{len(steps.losses):7}{steps.peak / GB:9.2f}{steps.kept / GB:9.2f}"
        )


def agreement(args: argparse.Namespace) -> Iterator[str]:
    """How near vectors of other dtypes, and those of this machine's CPU, are to float32's."""
    rows = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()[:64]]
    texts = [row["text"] for row in rows]
    expected = encode(args, texts, "float32")
    yield f"{len(texts)} texts, least and mean cosine to float32"
    others = {dtype: (dtype, None) for dtype in ("bfloat16", "float16")}
    if backend.IS_GPU and not backend.AS_METAL:
        others["float32, CPU"] = ("float32", mx.cpu)
    for name, how in others.items():
        show(f"vectors in {name}")
        cosines = (encode(args, texts, *how) * expected).sum(axis=1)
        yield f"  {name:14}{cosines.min():.6f} {cosines.mean():.6f}"


def overheads(args: argparse.Namespace) -> Iterator[str]:
    """Tokens a second with few large and many small micro-batches, compiled and not."""
    default = backend.MICRO_BATCH_OVERHEAD
    yield "overhead".ljust(16) + "".join(f"{overhead:>10,}" for overhead in OVERHEADS) + f"   (default {default:,})"
    for compiled in ("off", "on") if backend.IS_GPU else ("auto",):
        measured = []
        for overhead in OVERHEADS:
            show(f"overhead {overhead:,}, --compile {compiled}")
            backend.MICRO_BATCH_OVERHEAD = overhead
            try:
                measured.append(take_steps(args, args.tries, SECONDS_OF_OVERHEAD, compile=compiled))
            finally:
                backend.MICRO_BATCH_OVERHEAD = default
        if compiled != "on":  # the same micro-batches
            yield "micro-batches".ljust(16) + "".join(f"{statistics.fmean(s.micro_batches):10.1f}" for s in measured)
            yield "padding".ljust(16) + "".join(f"{statistics.fmean(s.padding):10.1%}" for s in measured)
        yield f"--compile {compiled}".ljust(16) + "".join(f"{steps.speed:10,.0f}" for steps in measured)
        yield "  first step, s".ljust(16) + "".join(f"{steps.seconds[0]:10.2f}" for steps in measured)


def memory(args: argparse.Namespace) -> Iterator[str]:
    """The process at its largest."""
    unit = 1 if platform.system() == "Darwin" else 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    yield f"process {largest / GB:.2f} GB at most; mlx holds {mx.get_active_memory() / GB:.2f} GB now"


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "versions": versions,
    "device": device,
    "default run": training,
    "vectors": agreement,
    "tokens/s by micro-batch overhead": overheads,
    "memory": memory,
}


def show(line: str) -> None:
    """Show progress on standard error, with the seconds since the start."""
    print(f"{time.perf_counter() - START:4.0f} s  {line}", file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this script's flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL, help="an embedding model's folder or name (default: the toolkit's)")
    for name, default, meaning in (
        ("--batch-size", 64, "examples in one loss"),
        ("--steps", 20, "steps of the default run in each dtype, at least 2"),
        ("--tries", 6, "steps for each overhead, at least 2"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{meaning} (default: {default})")
    return parser


def main() -> int:
    """Measure section after section, and print the block."""
    parser = make_parser()
    args = parser.parse_args()
    if min(args.steps, args.tries) < 2:
        parser.error("--steps and --tries: at least 2, as the first step is not counted")
    backend.prepare()
    block, failures = [], []
    for name, section in SECTIONS.items():
        block.append(name)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # lines of a run about itself
                block += (f"  {line}" for line in section(args))
        except KeyboardInterrupt:
            failures.append("interrupted")
            block.append("  interrupted")
        except Exception as error:  # a failure on a Mac is what the block is for
            failures.append(f"{type(error).__name__}: {error}")
            show(f"FAILED: {failures[-1]}")
            block.append(f"  FAILED: {failures[-1]}")
        block.append("")
        if failures[-1:] == ["interrupted"]:
            break
    ending = f"measured in {time.perf_counter() - START:.0f} s" + (f", {len(failures)} FAILED" if failures else "")
    print("\n".join(["```text", *block, ending, "```"]))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
