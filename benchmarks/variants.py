"""What else a tuned model has to be: no worse elsewhere, short as bits, small, and good at two things at once.

    pip install -r benchmarks/requirements.txt
    python benchmarks/variants.py --data ../shared/data/medquad --work FOLDER    # 2 hours beside other work
    python benchmarks/variants.py --work FOLDER --parts bits

all-MiniLM-L6-v2 with LoRA on MedQuAD, 24 steps of 64 pairs, `--similar-rows 4`, texts cut at 128 tokens in training and
tests; a seed changes the order of rows. Parts:

    merged   trained plainly; with 24 steps more that hold the toolkit's texts and code in place (`distill_vectors`);
             and that merged with the base model by `export.py --merge-with-base auto` under two guards (the share that
             is found with the first seed serves all): on MedQuAD, on the guards, on two sets that no run knows
    bits     documents as bits, queries as bits or float32, of the plain model and of one trained for it
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
FLOAT_QUERIES = "bits, float32 queries"
PARTS = ("merged", "bits", "student", "sources")
QUERIES = 300  # of a set of code
BITS = "--binary-weight 1"
HELD = 20  # weight of the texts that are held in place
STUDENT = "--train-type full --learning-rate 2e-4 --steps 150"


class Workshop:
    """Trains, exports and scores in a folder, where each result stays."""

    def __init__(self, data: Path, folder: Path):
        self.data, self.folder = data, folder
        self.base = minilm()

    def run(self, command: str, name: str, *flags: object) -> Path:
        """Return the folder or file that a command of the toolkit writes as `name`; its screen is in `name`.log."""
        target = self.folder / name
        if not target.exists():
            with open(self.folder / f"{name}.log", "w", encoding="utf-8") as screen:
                draft = self.folder / f"new-{name}"
                line = [sys.executable, ROOT / command, *flags, "--output", draft, "--overwrite"]
                began = time.perf_counter()
                subprocess.run(list(map(str, line)), check=True, stdout=screen, stderr=screen)
            draft.rename(target)
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        return target

    def train(self, name: str, seed: int, *flags: object, steps: int = STEPS) -> Path:
        """Return the final model of a run; "{name}-{seed}" is its folder."""
        always = ["--max-length", LENGTH, "--batch-size", BATCH, "--save-steps", 0, "--seed", seed, "--similar-rows", 4]
        flags = (*(() if "--model" in flags else ("--model", self.base)), *flags)
        flags = (*(() if "--steps" in flags else ("--steps", steps)), *flags)
        flags = (*(() if "--eval-tasks" in flags else ("--eval-tasks",)), *flags)
        return self.run("train.py", f"{name}-{seed}", *always, *flags) / "final"

    def medquad(self, seed: int) -> Path:
        """Return the plain model, trained on MedQuAD alone."""
        return self.train("plain", seed, "--data", self.data / "train.jsonl")

    def held(self, seed: int) -> Path:
        """Return the model of a run that holds other texts in place meanwhile."""
        import yaml

        guards = [self.code("stdlib"), self.eval_data()]
        others = [ROOT / "train-data.jsonl", self.code_pairs]
        flags = ["--teacher", self.base, "--max-length", LENGTH, "--data", *others]
        vectors = self.run("mine.py", "held.safetensors", "score", "--vectors", *flags)
        first = {"data": str(self.data / "train.jsonl"), "weight": 1}
        second = {"data": list(map(str, others)), "weight": 1, "loss": "distill_vectors", "distill_weight": HELD}
        settings = self.folder / "held.yaml"
        settings.write_text(yaml.safe_dump({"sources": [first, second], "teacher_vectors": str(vectors)}))
        judged = ["--eval-tasks", self.data / "dev", "--guard", *guards, "--eval-steps", 2 * STEPS]
        return self.train("held", seed, "--config", settings, *judged, steps=2 * STEPS)

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

    def scores(self, model: str | Path, task: Path, stored: str = "float32") -> Evaluation:
        """Return the evaluation of a model on a BEIR folder. `stored`: float32, bits, or bits with float32 queries."""
        name = str(model).removeprefix(str(self.folder)).strip("/").replace("/", "-")
        name = "base" if model == self.base else name
        return kept(str(self.folder / "scores"), f"{name}-{task.name}", stored, partial(_score, model, task, stored))


def _score(model: str | Path, task: Path, stored: str) -> Evaluation:
    from mlx_retrieval.evaluation.results import VectorFormat
    from mlx_retrieval.evaluation.retrieval import evaluate, evaluate_formats
    from mlx_retrieval.inference.embedder import load

    opened = load(str(model), max_length=LENGTH)
    if stored == "float32":
        return evaluate(opened, [str(task)])
    vector_format = VectorFormat("binary", opened.dimensions, stored == FLOAT_QUERIES)
    (evaluation,) = evaluate_formats(opened, [str(task)], [vector_format])[1].values()
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
    plain, held = ([train(seed) for seed in seeds] for train in (shop.medquad, shop.held))
    flags = [("--adapter", model, "--skip-library-check", "--merge-with-base") for model in held]
    blends = [shop.run("export.py", "merged-0", *flags[0], "auto")]
    share = re.search(r"([01][.][0-9]) chosen", (shop.folder / "merged-0.log").read_text())[1]
    blends += [shop.run("export.py", f"merged-{seed}", *flags[seed], share) for seed in seeds[1:]]
    rows = []
    for task in (test, *guards, *others):
        base = [shop.scores(shop.base, task)]
        name = "MedQuAD" if task == test else task.name
        kinds = {"trained": plain, "others held": held, f"and {share} of it": blends}
        results = {kind: [shop.scores(model, task) for model in models] for kind, models in kinds.items()}
        rows += [(f"{name}, {kind}, to base", each, base) for kind, each in results.items()]
        if task == test:
            rows += [(f"{name}, {kind}, to trained", results[kind], results["trained"]) for kind in list(kinds)[1:]]
    table("Trained on MedQuAD, and what becomes of other sets", rows)


def bits(shop: Workshop, seeds: range, flags: str) -> None:
    test, rows = shop.data / "test", ["--data", shop.data / "train.jsonl"]
    plain = [shop.medquad(seed) for seed in seeds]
    trained = [shop.train("bits", seed, *rows, *flags.split()) for seed in seeds]
    full = [shop.scores(model, test) for model in plain]
    lines = []
    for name, models in (("trained plainly", plain), ("trained for bits", trained)):
        for stored in ("float32", "bits", FLOAT_QUERIES):
            lines.append((f"{name}, {stored}", [shop.scores(model, test, stored) for model in models], full))
    table("Documents as bits, to the plain model's float32", lines[1:])


def student(shop: Workshop, seeds: range, flags: str) -> None:
    test, rows = shop.data / "test", shop.data / "train.jsonl"
    teacher = shop.medquad(seeds[0])
    whole = shop.run("export.py", "teacher", "--adapter", teacher, "--skip-library-check")
    cut = ["--keep-layers", 0, 2, 5, "--model", whole, "--skip-library-check"]
    start = shop.run("export.py", "student-start", *cut)
    vectors = shop.run("mine.py", "vectors.safetensors", "score", "--vectors", "--teacher", whole, "--data", rows)
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
