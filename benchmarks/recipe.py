"""Which side makes the better model in the same wall time: this toolkit's recipe, or sentence-transformers' own?

    pip install -r benchmarks/requirements.txt
    python benchmarks/recipe.py --data ../shared/data/medquad --minutes 5           # 45 minutes on 2 cores
    python benchmarks/recipe.py --data ../shared/data/medquad --minutes 30 --peer-mined-rows 4000

all-MiniLM-L6-v2 on MedQuAD. The peer does what its documentation recommends: `mine_hard_negatives`,
CachedMultipleNegativesRankingLoss with the `mini_batch_num_tokens` that is fastest here, NO_DUPLICATES, an
InformationRetrievalEvaluator on dev, and the best step by it. Each side may spend --minutes on mining, training and
evaluations on dev. Loading, and the steps that are measured beforehand to know how many there is time for, do not
count. Every run is a process of its own; seeds change the order of rows. Prints nDCG@10 of both on the test folder, the
difference with its interval over queries and seeds, and wall times. Figures in benchmarks/README.md.
"""

import argparse
import json
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peers
import sides
from seeds import difference, kept

EVALUATIONS = 4  # on dev, in a run
BUDGETS = (2048, 4096, 8192)  # of the peer's mini-batches, in tokens
OURS = "--max-length 256 --similar-rows 4"
MEASURED = 2  # steps, after one that warms up


class Outcome(NamedTuple):
    """The results of a run."""

    evaluation: Any  # on the test folder
    dev: float  # nDCG@10 of the best step
    steps: int
    seconds: float  # of all that counts
    mining: float  # seconds of it


class Stopwatch:
    """Counts wall seconds, but for those spent in `paused`."""

    def __init__(self):
        self.began, self.left_out = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began - self.left_out

    def paused(self, function, *args):
        """Return the result of `function(*args)`, whose time does not count."""
        began = time.perf_counter()
        result = function(*args)
        self.left_out += time.perf_counter() - began
        return result


def steps_in(seconds: float, step: float, evaluation: float) -> tuple[int, int]:
    """Return how many steps fit into `seconds`, and after how many of them each evaluation comes."""
    steps = max(EVALUATIONS, int((seconds - EVALUATIONS * evaluation) / step))
    every = steps // EVALUATIONS
    return every * EVALUATIONS, every


# --- this toolkit -------------------------------------------------------------------------------------------------


def our_side(args: argparse.Namespace, seed: int, folder: str) -> Outcome:
    import train
    from mlx_retrieval import backend
    from mlx_retrieval.evaluation.retrieval import evaluate
    from mlx_retrieval.inference.embedder import load
    from mlx_retrieval.training import run as training_run
    from mlx_retrieval.training.flags import from_flags

    backend.prepare()  # as commands do
    data, work = Path(args.data), Path(folder)
    base = load(sides.minilm(), max_length=256)
    watch = Stopwatch()
    flags = [*shlex.split(args.ours), "--data", str(data / "train.jsonl")]
    flags += ["--model", sides.minilm(), "--eval-tasks", str(data / "dev"), "--skip-eval-init"]
    flags += ["--seed", str(seed), "--save-steps", "0", "--output", str(work / "run")]

    def measured() -> tuple[float, float]:
        trainer = training_run.prepare(from_flags("", "", [*flags, "--dry-run", "--steps", "1000"])[0]).trainer
        times = []
        for k in range(1 + MEASURED):
            began = time.perf_counter()
            trainer.grad_cache(trainer.batches.batch(k), seed=k)
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        evaluate(base, [str(data / "dev")])
        return min(times[1:]), time.perf_counter() - began

    step, evaluation = watch.paused(measured)
    steps, every = steps_in(args.minutes * 60 - watch.seconds, step, evaluation)
    settings, _ = from_flags("", "", [*flags, "--steps", str(steps), "--eval-steps", str(every)])
    train.train(settings)
    seconds = watch.seconds
    dev = json.loads((work / "run" / "best.json").read_text())["tasks"]["dev"]["ndcg_at_10"]
    return Outcome(evaluate(load(work / "run" / "best"), [str(data / "test")]), dev, steps, seconds, 0.0)


# --- sentence-transformers ----------------------------------------------------------------------------------------


def read_task(folder: Path) -> tuple[dict[str, str], dict[str, str], dict[str, set[str]]]:
    """Return queries, documents and relevant documents of a BEIR folder, as InformationRetrievalEvaluator has them."""
    texts = []
    for name in ("queries", "corpus"):
        rows = map(json.loads, (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
        texts.append({row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in rows})
    relevant: dict[str, set[str]] = {}
    for line in (folder / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, document, grade = line.split("\t")
        if float(grade) > 0:
            relevant.setdefault(query, set()).add(document)
    return {query: text for query, text in texts[0].items() if query in relevant}, texts[1], relevant


def peer_side(args: argparse.Namespace, seed: int, folder: str) -> Outcome:
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers
    from sentence_transformers.util import mine_hard_negatives

    data, work, mining = Path(args.data), Path(folder), 0.0
    model = peers.sentence_transformer(sides.minilm(), args.peer_max_length)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = args.peer_dropout
    read = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    if args.peer_mined_rows:
        read = [read[i] for i in np.random.default_rng(seed).permutation(len(read))[: args.peer_mined_rows]]
    rows = Dataset.from_dict({"query": [r["query"] for r in read], "document": [r["document"] for r in read]})
    watch = Stopwatch()
    if args.peer_mined_rows:
        rows = mine_hard_negatives(
            rows, model, num_negatives=1, relative_margin=0.05, sampling_strategy="top", verbose=False
        )
        mining = watch.seconds
    queries, corpus, relevant = read_task(data / "dev")
    evaluator = InformationRetrievalEvaluator(queries, corpus, relevant, ndcg_at_k=[10], name="dev")

    def measured() -> tuple[int, float, float]:
        columns = [rows[name] for name in rows.column_names]
        drawn = np.random.default_rng(0).permutation(len(rows))
        size, timed = args.peer_batch_size, {}
        for budget in BUDGETS:
            loss_of = CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=budget)
            times = []
            for k in range(1 + MEASURED):
                chosen = drawn[k * size : (k + 1) * size].tolist()
                began = time.perf_counter()
                loss_of([model.preprocess([column[i] for i in chosen]) for column in columns], None).backward()
                times.append(time.perf_counter() - began)
                model.zero_grad()
            timed[budget] = min(times[1:])
        budget = min(timed, key=timed.get)
        began = time.perf_counter()
        evaluator(model)
        return budget, timed[budget], time.perf_counter() - began

    model.train()
    budget, step, evaluation = watch.paused(measured)
    steps, every = steps_in(args.minutes * 60 - watch.seconds, step, evaluation)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(work / "run"),
        per_device_train_batch_size=args.peer_batch_size,
        max_steps=steps,
        learning_rate=args.peer_learning_rate,
        warmup_steps=round(0.1 * steps),
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_dev_cosine_ndcg@10",
        seed=seed,
        use_cpu=not torch.accelerator.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=budget)
    trainer = SentenceTransformerTrainer(model, arguments, rows, loss=loss, evaluator=evaluator)
    trainer.train()
    seconds = watch.seconds
    model.max_seq_length = 256

    from mlx_retrieval.evaluation.retrieval import evaluate

    result = evaluate(peers.Peer(model.eval()), [str(data / "test")])
    return Outcome(result, trainer.state.best_metric, steps, seconds, mining)


def run(side: Callable[..., Outcome], args: argparse.Namespace, seed: int) -> Outcome:
    """Return the outcome of a side in a process and a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return sides.in_child(side, args, seed, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl, dev/ and test/")
    parser.add_argument("--minutes", type=float, default=5, help="of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ours", default=OURS, help="flags of train.py (default: %(default)s)")
    parser.add_argument("--peer-learning-rate", type=float, default=2e-5)
    parser.add_argument("--peer-batch-size", type=int, default=64)
    parser.add_argument(
        "--peer-mined-rows", type=int, default=0, help="train on so many, with a mined negative; 0 = all"
    )
    parser.add_argument("--peer-dropout", type=float, default=0.0, help="without it, a step takes half the time")
    parser.add_argument("--peer-max-length", type=int, default=256, help="tokens of a text in training")
    parser.add_argument("--only", choices=("ours", "peer"))
    parser.add_argument("--keep", metavar="FOLDER", help="keep finished runs here, and repeat none that is there")
    args = parser.parse_args()

    print(sides.machine(), flush=True)
    outcomes: dict[str, list[Outcome]] = {"ours": [], "peer": []}
    for seed in range(args.seeds):
        for name, side in (("ours", our_side), ("peer", peer_side)):
            if args.only in (None, name):
                chosen = {key: value for key, value in vars(args).items() if key.startswith(name)}
                settings = repr((args.minutes, chosen))
                outcome = Outcome(*kept(args.keep, f"{name}-{seed}", settings, lambda: run(side, args, seed)))  # noqa: B023
                outcomes[name].append(outcome)
                score = outcome.evaluation.average()["ndcg_at_10"]
                times = f"{outcome.steps} steps, {outcome.seconds:.0f} s, {outcome.mining:.0f} of them mining"
                print(f"{name}, seed {seed}: nDCG@10 {score:.4f} (dev {outcome.dev:.4f}), {times}", flush=True)

    results = {name: [outcome.evaluation for outcome in side] for name, side in outcomes.items()}
    for name, side in results.items():
        scores = [evaluation.average()["ndcg_at_10"] for evaluation in side]
        if scores:
            print(f"{name}: {statistics.fmean(scores):.4f}, from {min(scores):.4f} to {max(scores):.4f}")
    if all(results.values()):
        change, low, high = difference(results["peer"], results["ours"])
        print(f"ours less theirs: {change:+.4f} [{low:+.4f}, {high:+.4f}]")


if __name__ == "__main__":
    main()
