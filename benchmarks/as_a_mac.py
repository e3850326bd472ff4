"""What a Mac learns in half precision: the same runs in float32, bfloat16 and float16, as a Mac computes them.

    python benchmarks/as_a_mac.py --data ../shared/data/medquad                   25 minutes on 2 cores
    python benchmarks/as_a_mac.py --data ../shared/data/medquad --scale 0.1 --only LoRA full

all-MiniLM-L6-v2 and the embedded model, on MedQuAD and the embedded data. Every run is a process of its own with
`MLX_RETRIEVAL_AS=metal` (see mlx_retrieval/backend/as_metal.py; on a Mac it is Metal itself) and --dtype; the three of
a row have the same seed, data and steps. Finished runs are kept in --results, so that the script goes on where it was
stopped; a run that fails is named in the table, and tried again by the next call. Prints Markdown for
benchmarks/README.md.
"""

import argparse
import datetime
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sides import ROOT, minilm, processor

DTYPES = ("float32", "bfloat16", "float16")
LAST = 5  # steps whose mean loss is the loss at the end
LIMIT = 900  # seconds that one run may take
SEED = 0
ENVIRONMENT = {"MLX_RETRIEVAL_AS": "metal", "HF_HUB_OFFLINE": "1"}
# Held out: 128 pairs, whose loss is measured before and after.
PAIRS = "--batch-size 64 --max-length 32 --save-steps 0 --eval-steps 0 --eval-tasks --data @pairs"
CHAT = "--batch-size 8 --max-length 192 --mask-prompt --val-batches -1 --save-steps 0 --eval-steps 0 --data @chat"


@dataclass(frozen=True)
class Row:
    """A run of train.py in the table, but for its dtype.

    Args:
        steps: with --scale 1.
        flags: of train.py; @minilm, @pairs and @chat stand for the folders.
        metric: of the evaluations before and after.
    """

    name: str
    steps: int
    flags: str
    metric: str = "validation_loss"


ROWS = (
    Row("LoRA, the default run", 24, "--eval-steps 0 --save-steps 0", "ndcg_at_10"),
    Row("LoRA", 16, f"--model @minilm {PAIRS}"),
    Row("DoRA", 12, f"--model @minilm --train-type dora {PAIRS}"),
    Row("full, rate 2e-5", 20, f"--model @minilm --train-type full --learning-rate 2e-5 {PAIRS}"),
    Row("late", 12, f"--model @minilm --task late {PAIRS}"),
    Row("rerank", 12, f"--model @minilm --task rerank --random-negatives 3 {PAIRS} --batch-size 8"),
    Row("chat", 24, f"--task chat --learning-rate 4e-3 {CHAT}"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl")
    parser.add_argument("--results", default="as_a_mac.jsonl", help="file of finished runs (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps to take, 2 at least (default: 1)")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows whose names begin so")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    args = parser.parse_args()

    rows = [row for row in ROWS if not args.only or row.name.startswith(tuple(args.only))]
    if not rows:
        parser.error(f"--only: no such row; there are {', '.join(row.name for row in ROWS)}")
    results = measure(rows, args.dtypes, Path(args.data), Path(args.results), args.scale)
    print("\n".join(table(rows, args.dtypes, results, args.scale)))
    if failures := [result for result in results.values() if "error" in result]:
        sys.exit(f"{len(failures)} of {len(results)} runs failed")


def steps_of(row: Row, scale: float) -> int:
    return max(2, round(row.steps * scale))


# --- runs ---------------------------------------------------------------------------------------------------------


def measure(rows: list[Row], dtypes: list[str], data: Path, file: Path, scale: float) -> dict[tuple[str, str], dict]:
    """Take the runs that `file` lacks. Return the result of every run by (row, dtype); see `train`."""
    now = {"commit": commit(), "processor": processor(), "scale": scale}
    results = {(result["row"], result["dtype"]): result for result in kept(file, now)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(data / "train.jsonl", folder, scale)
        for row in rows:
            for dtype in dtypes:
                key = (row.name, dtype)
                if "error" not in results.get(key, {"error": "not yet taken"}):
                    continue
                results[key] = now | {"row": row.name, "dtype": dtype} | train(row, dtype, folder, scale)
                with open(file, "a", encoding="utf-8") as lines:
                    lines.write(json.dumps(results[key]) + "\n")
                print(f"{row.name}, {dtype}: {results[key]}", file=sys.stderr, flush=True)
    wanted = [(row.name, dtype) for row in rows for dtype in dtypes]
    return {key: results[key] for key in wanted}


def kept(file: Path, now: dict) -> Iterator[dict]:
    """Yield the results of this commit, machine and scale; a line that a stopped script left half is none."""
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        if now.items() <= result.items():
            yield result


def train(row: Row, dtype: str, folder: Path, scale: float) -> dict:
    """Take one run. Return its `loss`, the metric `before` and `after`, and `seconds`; or the `error` that ended it."""
    output = folder / f"{row.name}-{dtype}"
    places = {"@minilm": minilm(), "@pairs": str(folder / "pairs"), "@chat": str(folder / "chat")}
    flags = [places.get(flag, flag) for flag in row.flags.split()]
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *flags,
        "--seed",
        str(SEED),
        "--steps",
        str(steps_of(row, scale)),
    ]
    command += ["--dtype", dtype, "--output", str(output)]
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {LIMIT} s"}
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return {"error": f"exit code {done.returncode}: {lines[-1].strip() if lines else 'no word'}"}
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    losses = [record["loss"] for record in records if record["type"] == "train"]
    scores = [record["metrics"].get(row.metric) for record in records if record["type"] == "eval"]
    if not losses or len(scores) < 2 or None in scores:
        return {"error": f"metrics.jsonl holds {len(losses)} losses and as {row.metric} {scores}"}
    result = {"loss": statistics.fmean(losses[-LAST:]), "before": scores[0], "after": scores[-1]}
    if not all(map(math.isfinite, result.values())):
        return {"error": f"not finite: {result}"}
    return result | {"seconds": round(time.perf_counter() - began)}


# --- data ---------------------------------------------------------------------------------------------------------


def write_data(source: Path, folder: Path, scale: float) -> None:
    """Write the folders `pairs` and `chat`: as many random pairs of `source` as are needed, and others held out."""
    with open(source, encoding="utf-8") as lines:
        pairs = [(row["query"], row["document"]) for row in map(json.loads, lines)]
    random.Random(SEED).shuffle(pairs)
    chat = [
        {"messages": [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]}
        for query, answer in pairs
    ]
    retrieval = [{"query": query, "document": answer} for query, answer in pairs]
    most = max(steps_of(row, scale) for row in ROWS)
    for name, rows, held_out, batch in (("pairs", retrieval, 128, 64), ("chat", chat, 64, 8)):
        write_rows(folder / name / "valid.jsonl", rows[:held_out])
        write_rows(folder / name / "train.jsonl", rows[held_out : held_out + most * batch])


def write_rows(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- the table ----------------------------------------------------------------------------------------------------


def table(rows: list[Row], dtypes: list[str], results: dict[tuple[str, str], dict], scale: float) -> list[str]:
    """Return the lines of the table, and below it those of runs that failed."""
    lines = [
        f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores, commit {commit()}; {device()}",
        "",
        "| | steps | measured | " + " | ".join(dtypes) + " |",
        "|---|---|---|" + "---|" * len(dtypes),
    ]
    for row in rows:
        runs = [results[row.name, dtype] for dtype in dtypes]
        change = {"validation_loss": "held-out loss", "ndcg_at_10": "nDCG@10"}[row.metric]
        losses = [f"{run['loss']:.4f}" if "loss" in run else "failed" for run in runs]
        changes = [f"{run['before']:.4f} -> {run['after']:.4f}" if "loss" in run else "failed" for run in runs]
        lines.append(f"| {row.name} | {steps_of(row, scale)} | loss, last {LAST} steps | " + " | ".join(losses) + " |")
        lines.append(f"| | | {change} | " + " | ".join(changes) + " |")
    failures = [(*key, result["error"]) for key, result in results.items() if "error" in result]
    return [*lines, *([""] if failures else []), *(f"- {name}, {dtype}: {error}" for name, dtype, error in failures)]


def commit() -> str:
    """Return the checkout's commit, and whether files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=, with changes", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def device() -> str:
    """Return the device that the runs computed on, as their first lines name it."""
    code = "from mlx_retrieval import backend; print(backend.describe())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
