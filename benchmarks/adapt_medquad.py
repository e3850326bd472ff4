"""What a folder of documents alone is worth: adapt.py on MedQuAD's documents, without a question of its training set.

    pip install -r benchmarks/requirements.txt
    python benchmarks/adapt_medquad.py --data ../shared/data/medquad --work FOLDER          # 30 minutes on 2 cores
    python benchmarks/adapt_medquad.py --work FOLDER --generator mlx:smollm2     # where tools/fetch_smollm2.py puts it

The documents of train.jsonl become one file of JSON lines, each with its text alone. `adapt.py --budget 20m` goes from
them to a model of all-MiniLM-L6-v2, an index and a report; the base model and this one are then evaluated on
medquad/test, whose questions and documents no stage reads, on the guard that the run is given, and on sets that it
does not know: docstrings that look for their functions in the standard library, NumPy and scikit-learn.
Figures in benchmarks/README.md.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from seeds import cells, difference, kept, mean_of
from sides import ROOT, machine, smollm2
from variants import Workshop

from mlx_retrieval import backend
from mlx_retrieval.evaluation.results import Evaluation
from mlx_retrieval.evaluation.retrieval import evaluate
from mlx_retrieval.inference.embedder import load
from mlx_retrieval.utils.console import print_rows

backend.prepare()  # as commands do

LENGTH = 256  # tokens
SMOLLM2 = "mlx:smollm2"


def documents_of(data: Path, folder: Path) -> Path:
    """Return a folder with the documents of MedQuAD's training rows, each once; their questions are left behind."""
    target = folder / "documents"
    if not target.is_dir():
        rows = map(json.loads, (data / "train.jsonl").read_text(encoding="utf-8").splitlines())
        texts = dict.fromkeys(row["document"] for row in rows)
        target.mkdir(parents=True)
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (target / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
    return target


def adapt(shop: Workshop, seed: int, args: argparse.Namespace) -> tuple[Path, float]:
    """Return the folder of an adaptation and its minutes, as far as it was not there. Ends the script if it fails."""
    generator = f"mlx:{smollm2()}" if args.generator == SMOLLM2 else args.generator
    flags = ["--generator", generator, "--budget", args.budget, "--seed", str(seed)]
    flags += args.flags.split()
    output = shop.folder / f"adapted-{hashlib.sha256(repr(flags).encode()).hexdigest()[:8]}-{seed}"
    line = [sys.executable, ROOT / "adapt.py", documents_of(shop.data, shop.folder), "--model", shop.base]
    began = time.perf_counter()
    with open(f"{output}.log", "a", encoding="utf-8") as screen:
        done = subprocess.run([*map(str, [*line, "--output", output, *flags])], stdout=screen, stderr=screen)
    if done.returncode:
        sys.exit(f"adapt.py ended with exit code {done.returncode}; what it said is in {output}.log")
    return output, (time.perf_counter() - began) / 60


def scores(shop: Workshop, model: str | Path, task: Path) -> Evaluation:
    """Return the evaluation of a model on a BEIR folder, at the length of the published model."""
    name = f"{'base' if model == shop.base else Path(model).parent.name}-{task.name}"
    return kept(str(shop.folder / "scores"), name, str(LENGTH), partial(_score, model, task))


def _score(model: str | Path, task: Path) -> Evaluation:
    return evaluate(load(str(model), max_length=LENGTH), [str(task)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl and test/")
    parser.add_argument("--work", required=True, metavar="FOLDER", help="for documents, models and scores")
    parser.add_argument("--generator", default="none", help="of adapt.py, or mlx:smollm2 (default: %(default)s)")
    parser.add_argument("--budget", default="20m", help="of adapt.py (default: %(default)s)")
    parser.add_argument("--flags", default="", help="further flags of adapt.py")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()

    print(machine(), flush=True)
    shop = Workshop(Path(args.data).resolve(), Path(args.work).resolve())
    shop.folder.mkdir(parents=True, exist_ok=True)
    models = []
    for seed in range(args.seeds):
        output, minutes = adapt(shop, seed, args)
        print(f"seed {seed}: {minutes:.1f} min", flush=True)
        models.append(output / "model" if (output / "model").is_dir() else shop.base)
    tasks = [shop.data / "test", shop.eval_data(), *(shop.code(name) for name in ("stdlib", "numpy", "sklearn"))]
    rows = []
    for task in tasks:
        base, results = [scores(shop, shop.base, task)], [scores(shop, model, task) for model in models]
        before, after = (mean_of(those).average()["ndcg_at_10"] for those in (base, results))
        name = "medquad/test" if task == tasks[0] else task.name
        rows.append((name, f"{before:.4f}", *cells(after, difference(base, results))))
    columns = ("set", "before", "after", "difference", "95 % interval")
    print_rows(f"all-MiniLM-L6-v2, {args.generator}, {args.budget}", columns, rows)


if __name__ == "__main__":
    main()
