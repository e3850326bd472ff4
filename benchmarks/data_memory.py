"""Does memory grow with the data? Opens a small and a large file of rows, each in a process of its own.

python benchmarks/data_memory.py                               50,000 against 5,000,000 rows: 2 GB of disk, some minutes
python benchmarks/data_memory.py --rows 5000 300000            in seconds
python benchmarks/data_memory.py --format csv --rows 5000 500000      tables of text: 2 MB against 200 MB

It measures the peak of resident memory from the interpreter's start to the last of ten batches, which are read and
tokenised in the background as in training. Row positions and the order of an epoch grow with the data.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SENTENCE = "the boiler drips at night and no one knows why it rains on the grey town where a bike squeaks"
WORDS = SENTENCE.split()


def write_rows(path: Path, count: int) -> None:
    """Write rows of about 400 bytes, all different, as JSON lines or CSV by the file's ending."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ("query", "document", "rank")) if path.suffix == ".csv" else None
        if table:
            table.writeheader()
        for i in range(count):
            first = i % len(WORDS)
            words = " ".join(WORDS[first:] + WORDS[:first])
            row = {"query": f"{i} {words[:60]}", "document": f"{i} {words} {words} {words}", "rank": i % 20 + 1}
            if table:
                table.writerow(row)
            else:
                file.write(json.dumps(row) + "\n")


def peak_memory() -> int:
    """Return the peak resident bytes of this process. On Linux, getrusage may count the parent's from before exec."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def measure(path: Path) -> dict:
    """Open the file and take ten batches, in this process."""
    sys.path.insert(0, str(ROOT))
    from data_loader import Batches
    from mlx_retrieval.dataset.rows import Rows
    from mlx_retrieval.models.tokenizer import TextTokenizer

    tokenizer = TextTokenizer(ROOT / "gemma-3-tiny-mlx", {}, {"query": 32, "document": 128})
    began = time.perf_counter()
    rows = Rows([path])
    opened = time.perf_counter()
    for _ in Batches(rows, tokenizer, 64).stream(0, 10):
        pass
    batches = time.perf_counter() - opened
    return {"rows": len(rows), "open_s": opened - began, "batches_s": batches, "peak_bytes": peak_memory()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs=2, default=[50_000, 5_000_000], metavar="N", help="small and large")
    parser.add_argument("--format", choices=("jsonl", "csv"), default="jsonl")
    parser.add_argument("--most", type=float, default=300, help="most growth in MB: above it the exit code is 1")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure one file in this process, as JSON")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return 0
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for count in args.rows:
            path = Path(folder) / f"rows.{args.format}"
            write_rows(path, count)
            command = [sys.executable, __file__, "--measure", str(path)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            peaks.append(found["peak_bytes"] / 1e6)
            print(
                f"{found['rows']:>9,} rows, {path.stat().st_size / 1e6:7,.0f} MB: peak {peaks[-1]:6.1f} MB, "
                f"opened in {found['open_s']:6.1f} s, ten batches in {found['batches_s']:.2f} s",
                flush=True,
            )
    growth = peaks[1] - peaks[0]
    print(f"growth {growth:.1f} MB, {'within' if growth < args.most else 'ABOVE'} {args.most:g} MB")
    return int(growth >= args.most)


if __name__ == "__main__":
    sys.exit(main())
