"""What else a tuned model has to be: no worse elsewhere, short as bits, small, and good at two things at once.

    pip install -r benchmarks/requirements.txt
    python benchmarks/variants.py --data ../shared/data/medquad --work FOLDER         # 90 minutes on 2 cores
    python benchmarks/variants.py --work FOLDER --parts bits

all-MiniLM-L6-v2 with LoRA on MedQuAD, 24 steps of 64 pairs, texts cut at 128 tokens in training and tests; a seed
changes the order of rows. Parts:

    merged   with the base model by `export.py --merge-with-base auto` under two guards (the share that is found with
             the first seed serves all), on MedQuAD, on the guards, and on two sets that the run knows nothing of
    bits     the vectors as bits (both sides, Hamming distance), of the plain model and of one trained for it
    student  three of the tuned model's six layers, trained by its vectors; their speed by turns with the teacher
    sources  MedQuAD and code pairs together, each batch of one source or of both, against each alone

Sets of code are docstrings that look for their functions: the standard library (80 modules held out), NumPy and
scikit-learn. What is in FOLDER from an earlier call is not computed again. Figures in benchmarks/README.md.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from seeds import cells, difference, kept, mean_of
from sides import ROOT, machine, minilm

from mlx_retrieval import backend
from mlx_retrieval.evaluation.results import Evaluation
from mlx_retrieval.utils.console import print_rows

backend.prepare()  # as commands do

LENGTH, BATCH, STEPS = 128, 64, 24
PARTS = ("merged", "bits", "student", "sources")
QUERIES = 300  # of a set of code
BITS = "--binary-weight 1"
STUDENT = "--train-type full --learning-rate 2e-4 --steps 150"


class Workshop:
    """Trains, exports and scores in a folder, where each result stays."""

    def __init__(self, data: Path, folder: Path):
        self.data, self.folder = data, folder
        self.base = minilm()

    def run(self, command: str, name: str, *flags: object) -> Path:
        """Return the folder that a command of the toolkit writes as `name`; its screen is in `name`.log."""
        target = self.folder / name
        if not target.exists():
            with open(self.folder / f"{name}.log", "w", encoding="utf-8") as screen:
                draft = self.folder / f"{name}.new"
                line = [sys.executable, ROOT / command, *flags, "--output", draft, "--overwrite"]
                began = time.perf_counter()
                subprocess.run(list(map(str, line)), check=True, stdout=screen, stderr=screen)
            draft.rename(target)
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        return target

    def train(self, name: str, seed: int, *flags: object, steps: int = STEPS) -> Path:
        """Return the final model of a run; "{name}-{seed}" is its folder."""
        always = ["--max-length", LENGTH, "--batch-size", BATCH, "--save-steps", 0, "--seed", seed]
        flags = (*(() if "--model" in flags else ("--model", self.base)), *flags)
        flags = (*(() if "--steps" in flags else ("--steps", steps)), *flags)
        flags = (*(() if "--eval-tasks" in flags else ("--eval-tasks",)), *flags)
        return self.run("train.py", f"{name}-{seed}", *always, *flags) / "final"

    def medquad(self, seed: int) -> Path:
        """Return the plain model, trained on MedQuAD alone, with the guards that only `export.py` obeys."""
        rows, dev = self.data / "train.jsonl", self.data / "dev"
        guards = [self.code("stdlib"), self.eval_data()]
        judged = ["--eval-tasks", dev, "--guard", *guards, "--eval-steps", STEPS]
        return self.train("plain", seed, "--data", rows, *judged)

    def code(self, library: str) -> Path:
        """Return a BEIR folder of a library's functions; those of the standard library are not in `code_pairs`."""
        folder = self.folder / "sets" / library
        if not folder.exists():
            from code_search import hold_out, write_task

            from mlx_retrieval.mining.code_pairs import pairs

            if library == "stdlib":
                known, held_out = hold_out(list(pairs([sysconfig.get_paths()["stdlib"]])), 80)
                rows = (json.dumps({"query": pair.query, "positive": pair.positive}) + "\n" for pair in known)
                folder.parent.mkdir(parents=True, exist_ok=True)
                self.code_pairs.write_text("".join(rows), encoding="utf-8")
            else:
                root = Path(importlib.util.find_spec(library).origin).parent
                found = list(pairs([str(root)]))
                _, held_out = hold_out(found, min(60, len({pair.path for pair in found}) - 1))
            write_task(folder, held_out, QUERIES)
        return folder

    @property
    def code_pairs(self) -> Path:
        return self.folder / "sets" / "stdlib-train.jsonl"

    def eval_data(self) -> Path:
        return ROOT / "eval-data"

    def scores(self, model: str | Path, task: Path, bits: bool = False) -> Evaluation:
        """Return the evaluation of a model on a BEIR folder."""
        name = str(model).removeprefix(str(self.folder)).strip("/").replace("/", "-")
        name = "base" if model == self.base else name
        return kept(str(self.folder / "scores"), f"{name}-{task.name}", repr(bits), partial(_score, model, task, bits))


def _score(model: str | Path, task: Path, bits: bool) -> Evaluation:
    from mlx_retrieval.evaluation.retrieval import evaluate, evaluate_formats
    from mlx_retrieval.inference.embedder import load

    opened = load(str(model), max_length=LENGTH)
    if not bits:
        return evaluate(opened, [str(task)])
    (evaluation,) = evaluate_formats(opened, [str(task)], [("binary", opened.dimensions)])[1].values()
    return evaluation


def table(title: str, rows: Sequence[tuple[str, Sequence[Evaluation], Sequence[Evaluation]]]) -> None:
    """Print the mean nDCG@10 of each row's evaluations, one a seed, and its difference to others'."""
    lines = []
    for name, results, others in rows:
        score = mean_of(results).average()["ndcg_at_10"]
        lines.append((name, *cells(score, difference(others, results))))
    print_rows(title, ("what", "nDCG@10", "difference", "95 % interval"), lines)


# --- parts --------------------------------------------------------------------------------------------------------


def merged(shop: Workshop, seeds: range) -> None:
    guards, others = [shop.code("stdlib"), shop.eval_data()], [shop.code("numpy"), shop.code("sklearn")]
    test = shop.data / "test"
    tuned = [shop.medquad(seed) for seed in seeds]
    shop.run("export.py", "merged-0", "--adapter", tuned[0], "--merge-with-base", "auto", "--skip-library-check")
    share = re.search(r"([01][.][0-9]) chosen", (shop.folder / "merged-0.log").read_text())[1]
    blends = [shop.folder / "merged-0"]
    for seed in seeds[1:]:
        flags = ["--adapter", tuned[seed], "--merge-with-base", share, "--skip-library-check"]
        blends.append(shop.run("export.py", f"merged-{seed}", *flags))
    rows = []
    for task in (test, *guards, *others):
        base = [shop.scores(shop.base, task)]
        plain, blend = ([shop.scores(model, task) for model in side] for side in (tuned, blends))
        name = "MedQuAD" if task == test else task.name
        rows.append((f"{name}: tuned, to base", plain, base))
        rows.append((f"{name}: merged, to base", blend, base))
        if task == test:
            rows.append((f"{name}: merged, to tuned", blend, plain))
    table(f"Guarded and merged, {share} of the trained weights", rows)


def bits(shop: Workshop, seeds: range, flags: str) -> None:
    test = shop.data / "test"
    rows = ["--data", shop.data / "train.jsonl"]
    plain = [shop.medquad(seed) for seed in seeds]
    trained = [shop.train("bits", seed, *rows, *flags.split()) for seed in seeds]
    full = [shop.scores(model, test) for model in plain]
    lines = [("trained plainly, as bits", [shop.scores(model, test, bits=True) for model in plain], full)]
    lines += [("trained for bits, as float32", [shop.scores(model, test) for model in trained], full)]
    lines += [("trained for bits, as bits", [shop.scores(model, test, bits=True) for model in trained], full)]
    table("As bits, to the plain model's float32", lines)


def student(shop: Workshop, seeds: range, flags: str) -> None:
    test, rows = shop.data / "test", shop.data / "train.jsonl"
    teacher = shop.medquad(seeds[0])
    whole = shop.run("export.py", "teacher", "--adapter", teacher, "--skip-library-check")
    cut = ["--keep-layers", 0, 2, 5, "--model", whole, "--skip-library-check"]
    start = shop.run("export.py", "student-start", *cut)
    vectors = shop.run("mine.py", "vectors", "score", "--vectors", "--teacher", whole, "--data", rows)
    taught = ["--model", start, "--data", rows, "--loss", "distill_vectors", "--teacher-vectors", vectors]
    students = [shop.train("student", seed, *taught, *flags.split()) for seed in seeds]
    before = [shop.scores(whole, test)]
    lines = [("three layers, untrained", [shop.scores(start, test)], before)]
    lines += [("three layers, trained", [shop.scores(model, test) for model in students], before)]
    table(f"A student of {before[0].average()['ndcg_at_10']:.4f}", lines)
    print(f"speed: {_speed(whole, students[0], test):.2f} times the teacher's")


def _speed(teacher: Path, student: Path, task: Path, rounds: int = 5) -> float:
    import statistics

    from recipe import read_task

    from mlx_retrieval.inference.embedder import load

    texts = list(read_task(task)[1].values())[:400]
    models = [load(str(path), max_length=LENGTH) for path in (teacher, student)]
    ratios = []
    for turn in range(1 + rounds):
        seconds = []
        for model in models:
            began = time.perf_counter()
            model.encode(texts, prompt="document")
            seconds.append(time.perf_counter() - began)
        ratios += [seconds[0] / seconds[1]] if turn else []
    return statistics.median(ratios)


def sources(shop: Workshop, seeds: range) -> None:
    medquad, code = shop.data / "test", shop.code("stdlib")
    both = ["--data", f"{shop.data / 'train.jsonl'}:1", f"{shop.code_pairs}:1"]
    runs = {
        "MedQuAD alone": [shop.medquad(seed) for seed in seeds],
        "code alone": [shop.train("code", seed, "--data", shop.code_pairs) for seed in seeds],
    }
    for kind in ("homogeneous", "mixed"):
        flags = [*both, "--batches", kind]
        runs[kind] = [shop.train(kind, seed, *flags, steps=2 * STEPS) for seed in seeds]
    for task, alone in ((medquad, "MedQuAD alone"), (code, "code alone")):
        results = {name: [shop.scores(model, task) for model in models] for name, models in runs.items()}
        lines = [(name, results[name], results[alone]) for name in ("homogeneous", "mixed")]
        lines.append(("homogeneous, to mixed", results["homogeneous"], results["mixed"]))
        score = mean_of(results[alone]).average()["ndcg_at_10"]
        table(f"{task.name}: {alone} {score:.4f}", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl, dev/ and test/")
    parser.add_argument("--work", required=True, metavar="FOLDER", help="for models and scores")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bits", default=BITS, help="flags of train.py for bits (default: %(default)s)")
    parser.add_argument("--student", default=STUDENT, help="flags of train.py for the student (default: %(default)s)")
    args = parser.parse_args()

    print(machine(), flush=True)
    shop = Workshop(Path(args.data).resolve(), Path(args.work).resolve())
    shop.folder.mkdir(parents=True, exist_ok=True)
    more = {"bits": (args.bits,), "student": (args.student,)}
    for part in args.parts:
        {"merged": merged, "bits": bits, "student": student, "sources": sources}[part](
            shop, range(args.seeds), *more.get(part, ())
        )


if __name__ == "__main__":
    main()
