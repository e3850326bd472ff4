"""Do mined negatives pay? all-MiniLM-L6-v2 on MedQuAD with and without, at the same number of document tokens.

    pip install -r benchmarks/requirements.txt
    python benchmarks/hard_negatives.py                           # about 15 minutes on 2 cores
    python benchmarks/hard_negatives.py --negatives 3 --relative-margin 0.1 --seeds 3

Mines negatives for rows of MedQuAD's train.jsonl with the same model that is then trained twice, for the same steps:
without negatives, in batches of --batch-size rows; and with negatives, in batches so much smaller that no more tokens
of documents are embedded. Both are evaluated by eval.py on the test folder. Prints the tokens, nDCG@10 and others, and
the paired-bootstrap interval of the difference. Rows are those of a batch,
tokens those of all steps of seed 0. Figures in benchmarks/README.md.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from seeds import mean_of
from sides import minilm, read_pairs

import mine
import train
from data_loader import Batches
from mlx_retrieval import backend
from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.evaluation.results import METRICS, compare
from mlx_retrieval.evaluation.retrieval import evaluate
from mlx_retrieval.inference.embedder import Model, load
from mlx_retrieval.training import config
from mlx_retrieval.utils.console import print_lines, print_rows

backend.prepare()  # as commands do


def document_tokens(data: Path, model: Model, size: int, steps: int, seed: int) -> int:
    """Tokens of documents in `steps` batches of `size` rows; as in training, a batch has every distinct text once."""
    batches, count = Batches(Rows([data]), model.tokenizer, size, seed), 0
    for k in range(steps):
        batch = batches.batch(k)
        count += int(batch.texts.lengths[batch.queries :].sum())
    return count


def equal_size(data: Path, model: Model, budget: int, steps: int, seed: int) -> tuple[int, int]:
    """Return the largest batch size that embeds no more than `budget` tokens, and its tokens."""
    size = max(2, budget // (document_tokens(data, model, 4, steps, seed) // 4))
    while (tokens := document_tokens(data, model, size, steps, seed)) > budget and size > 2:
        size -= 1
    return size, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl and test/")
    parser.add_argument("--rows", type=int, default=4_000, help="rows to mine for and to train on, a random part")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64, help="rows of a batch without negatives")
    parser.add_argument("--negatives", type=int, default=1, help="mined for each query")
    parser.add_argument("--skip", type=int, default=0, help="of mine.py negatives")
    parser.add_argument("--relative-margin", default="0.05", help="of mine.py negatives")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seeds", type=int, default=1, help="runs on each side, with other seeds; the means count")
    parser.add_argument("--output", help="keep rows and adapters in this new folder")
    args = parser.parse_args()
    work = Path(args.output or tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=not args.output)
    print_lines([("device", backend.describe())])

    known = read_pairs(args.data)
    chosen = np.sort(np.random.default_rng(0).permutation(len(known))[: args.rows])
    plain, mined = work / "pairs.jsonl", work / "mined.jsonl"
    rows = ({"query": known[i][0], "positive": known[i][1]} for i in chosen)
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    began = time.perf_counter()
    flags = ("--take", args.negatives, "--skip", args.skip, "--relative-margin", args.relative_margin)
    flags += ("--data", plain, "--output", mined, "--model", minilm(), "--max-length", args.max_length)
    if code := mine.main(["negatives", *map(str, flags)]):
        sys.exit(code)
    print_lines([("mined", f"{len(chosen):,} rows, {time.perf_counter() - began:.0f} s")])

    base = load(minilm(), max_length=args.max_length)
    task = str(Path(args.data) / "test")
    sizes, tokens = {"without": args.batch_size}, {}
    tokens["without"] = document_tokens(plain, base, args.batch_size, args.steps, 0)
    sizes["with"], tokens["with"] = equal_size(mined, base, tokens["without"], args.steps, 0)
    results, seconds = {"before": evaluate(base, [task])}, {}
    for name, data in {"without": plain, "with": mined}.items():
        began, runs = time.perf_counter(), []
        for seed in range(args.seeds):
            settings = config.Settings(
                model=minilm(), data=[str(data)], batch_size=sizes[name], steps=args.steps, seed=seed, eval_tasks=[],
                learning_rate=args.learning_rate, save_steps=0, max_length=args.max_length,
                output=str(work / f"{name}-{seed}"),
            )  # fmt: skip
            train.train(settings)
            runs.append(settings.output)
        seconds[name] = time.perf_counter() - began
        results[name] = mean_of([evaluate(load(f"{output}/final"), [task]) for output in runs])

    shown = ("ndcg_at_10", "mrr_at_10", "precision_at_1")
    table = []
    for name, result in results.items():
        trained = [f"{sizes[name]}", f"{tokens[name]:,}", f"{seconds[name]:.0f}"] if name in sizes else ["", "", ""]
        table.append([name, *trained, *(f"{result.average()[metric]:.4f}" for metric in shown)])
    title = f"MedQuAD test; {args.steps} steps, {args.negatives} mined a query, seeds: {args.seeds}"
    print_rows(title, ("negatives", "rows", "doc tokens", "s", *(METRICS[metric] for metric in shown)), table)
    table = []
    for one, other in (("before", "without"), ("before", "with"), ("without", "with")):
        for metric, _, _, change, low, high in compare(results[one], results[other])[:2]:  # nDCG and MRR
            table.append([f"{other} less {one}, {METRICS[metric]}", f"{change:+.4f}", f"[{low:+.4f}, {high:+.4f}]"])
    print_rows("differences, the same queries", ("of", "difference", "95 % interval"), table)


if __name__ == "__main__":
    main()
