"""A stranger's first run: MedQuAD as a CSV with the columns question and answer, and no flag but --data.

    python benchmarks/own_data.py --data ../shared/data/medquad
    python benchmarks/own_data.py --data ../shared/data/medquad --model MiniLM --rows 4000

`python train.py --data my.csv` runs in an empty folder, and its own held-out questions judge it. Prints the run's
screen, and a line for the table in benchmarks/README.md: nDCG@10 before and after, its interval, wall time.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sides

ROOT = Path(__file__).resolve().parent.parent


def write_csv(rows: Path, target: Path, count: int) -> int:
    """Write the first `count` rows, 0 = all, as question,answer; return how many there are."""
    with open(rows, encoding="utf-8") as lines, open(target, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["question", "answer"])
        number = 0
        for number, row in enumerate(map(json.loads, lines), start=1):
            table.writerow([row["query"], row["document"]])
            if number == count:
                break
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl")
    parser.add_argument("--rows", type=int, default=0, help="use the first N rows; 0 = all")
    parser.add_argument("--model", help="MiniLM, or a model for train.py's --model (default: none given)")
    parser.add_argument("--keep", type=Path, help="an empty folder to run in, which is kept")
    args = parser.parse_args()

    print(sides.machine(), flush=True)
    model = sides.minilm() if args.model == "MiniLM" else args.model
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        count = write_csv(Path(args.data) / "train.jsonl", folder / "my.csv", args.rows)
        command = [sys.executable, str(ROOT / "train.py"), "--data", "my.csv", *(["--model", model] if model else [])]
        began = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True)
        minutes = (time.perf_counter() - began) / 60
        results = json.loads((folder / "adapters" / "results.json").read_text(encoding="utf-8"))
    print(f"\n{count:,} rows, {minutes:.0f} min: {json.dumps(results)}")


if __name__ == "__main__":
    main()
