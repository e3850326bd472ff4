"""Training: useful tokens a second, beside sentence-transformers or the reference design's loop.

    pip install -r benchmarks/requirements.txt
    python benchmarks/train_speed.py --against sentence-transformers --data ../shared/data/medquad
    python benchmarks/train_speed.py --against sentence-transformers --model gemma
    python benchmarks/train_speed.py --against reference --rounds 1
    python benchmarks/train_speed.py --compile on --peer-tokens 0 16384 65536    # on a GPU; all of gpu_check.sh
    python benchmarks/train_speed.py --batches 32,64,128,256 --picture benchmarks/train_speed.png
    python benchmarks/train_speed.py --train-type full
    python benchmarks/train_speed.py --task late --batch-size 64

Rows of MedQuAD at their real lengths, LoRA r = 16 on all linear layers, AdamW, clipping, the loss over the full batch.
A late model's projection is trained as well, by both sides.
Against sentence-transformers both sides have the same weights, rows and limits, and their first losses must agree. Of
the mini-batches that --peer-tokens names, the peer gets that with which it is fastest on a quarter of each batch; which
one, is printed. A turn is a whole step, from texts to updated weights. Figures in benchmarks/README.md.
"""

import argparse
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import peers
import sides
from sides import Side, Turn

TEMPERATURE, LATE_TEMPERATURE, LEARNING_RATE = 0.05, 1.0, 2e-4  # of late models: the peer's default
MICRO_BATCH_ROWS = 16  # of the reference design
PEER_TOKENS = (0, 1_024, 2_048, 4_096, 8_192, 16_384)  # the peer's mini_batch_num_tokens; 0 = mini-batches of 32 rows
ROLES = ("query", "document")
NAMES = {"sentence-transformers": "CachedMultipleNegativesRankingLoss", "reference": "reference design"}
LATE_NAME = "CachedMultiVectorMultipleNegativesRankingLoss"


def prepared(
    model: str,
    rows: Path,
    batch_size: int,
    max_length: int,
    micro_batch_tokens: int | str = 0,
    compile: str = "auto",
    dequantize: str = "auto",
    task: str = "embed",
    train_type: str = "lora",
):
    """Return a run of the toolkit that is ready to take steps; see `run.prepare`."""
    from mlx_retrieval import backend
    from mlx_retrieval.training import config, run

    backend.prepare()  # as commands do
    settings = config.Settings(
        model=model,
        task=task,
        train_type=train_type,
        data=[str(rows)],
        batch_size=batch_size,
        micro_batch_tokens=micro_batch_tokens,
        compile=compile,
        dequantize=dequantize,
        max_length=max_length,
        temperature=LATE_TEMPERATURE if task == "late" else TEMPERATURE,
        learning_rate=LEARNING_RATE,
        schedule="constant",
        warmup=0,
        eval_tasks=[],
        save_steps=0,
        output=str(rows.parent / "run"),
    )
    return run.prepare(settings)


def ours(
    model: str,
    rows: Path,
    batch_size: int,
    max_length: int,
    budget: int | str,
    compile: str,
    task: str,
    train_type: str,
    steps: int,
) -> Callable:
    trainer = prepared(model, rows, batch_size, max_length, budget, compile, task=task, train_type=train_type).trainer
    # Two more than are used, so that every step has another batch built beside it, as in a long run.
    stream = trainer.batches.stream(0, steps + 2)

    def turn(k: int) -> Turn:
        began = time.perf_counter()
        metrics = trainer.update(next(stream), k + 1)
        seconds = time.perf_counter() - began
        padded = round(metrics["tokens"] / (1 - metrics["padding"]))
        return Turn(seconds, metrics["tokens"], sides.peak_memory_of_mlx(), padded, metrics["loss"])

    return turn


def texts_of_batches(rows: Path, batch_size: int, steps: int) -> list[list[tuple[str, str]]]:
    """Return (query, positive) of the rows in each of the toolkit's batches."""
    from data_loader import Batches
    from mlx_retrieval.dataset.rows import Rows

    read = Rows([rows])
    batches = Batches(read, None, batch_size)  # no tokenizer: texts are wanted
    return [[(read[i].query, read[i].positive) for i in batches.row_numbers(k)] for k in range(steps)]


def sentence_transformers(
    model: str, batches: list, max_length: int, task: str, train_type: str, budget: int
) -> Callable[[int], Turn]:
    import torch
    from sentence_transformers.multi_vector_encoder.losses import CachedMultiVectorMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    # Stays in evaluation mode: the toolkit has no dropout by default, and so the losses can be compared.
    peer = peers.sentence_transformer(model, max_length, late=task == "late")
    if train_type == "lora":
        peers.add_lora(peer, rank=16, alpha=32)
    mini_batches = {"mini_batch_size": 32, "mini_batch_num_tokens": budget or None}
    if task == "late":
        loss_of = CachedMultiVectorMultipleNegativesRankingLoss(peer, scale=1 / LATE_TEMPERATURE, **mini_batches)
    else:
        loss_of = CachedMultipleNegativesRankingLoss(peer, scale=1 / TEMPERATURE, **mini_batches)
    parameters = [p for name, p in peer.named_parameters() if p.requires_grad and "pooler" not in name]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    seen: list[int] = []  # padded tokens of every mini-batch; all go through the model twice
    peer[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]["input_ids"].numel()))

    def turn(k: int) -> Turn:
        seen.clear()
        began = time.perf_counter()
        columns = zip(*batches[k], strict=True)
        features = [peer.preprocess(list(texts), task=role) for texts, role in zip(columns, ROLES, strict=True)]
        tokens = sum(int(side["attention_mask"].sum()) for side in features)
        features = [{n: v.to(peer.device) if torch.is_tensor(v) else v for n, v in side.items()} for side in features]
        optimizer.zero_grad()
        loss = loss_of(features, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - began
        return Turn(seconds, tokens, sides.peak_memory_of_torch(), sum(seen) // 2, loss.item())

    return turn


def reference(model: str, rows: Path, batch_size: int, max_length: int) -> Callable[[int], Turn]:
    """The reference design: micro-batches of 16 rows as they come, all padded to the batch's longest text, each with a
    loss of its own; mlx and its CPU wheel as they come. Not what one wants: a row only sees 15 negatives."""
    import os
    import warnings

    os.environ["MLX_RETRIEVAL_PLAIN"] = "1"
    import mlx.core as mx  # before backend, which then has no BLAS to load, and says so
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx.utils import tree_map

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlx_retrieval import backend  # noqa: F401
    from mlx_retrieval.models.batching import MicroBatch, pad_rows

    trainer = prepared(model, rows, batch_size, max_length).trainer
    network, batches = trainer.model, trainer.batches
    optimizer = optim.AdamW(LEARNING_RATE, weight_decay=0.0)

    def loss_of(queries: MicroBatch, documents: MicroBatch) -> mx.array:
        scores = network(queries) @ network(documents).T / TEMPERATURE
        return nn.losses.cross_entropy(scores, mx.arange(len(scores)), reduction="mean")

    loss_and_gradient = nn.value_and_grad(network, loss_of)

    def turn(k: int) -> Turn:
        began = time.perf_counter()
        batch = batches.batch(k)  # no text is there twice, so row i has query i and document i
        padded = pad_rows(batch.texts, range(len(batch.texts)), batches.tokenizer.pad_id)
        losses, total = [], None
        for first in range(0, batch_size, MICRO_BATCH_ROWS):
            last = min(first + MICRO_BATCH_ROWS, batch_size)
            ranges = [slice(side + first, side + last) for side in (0, batch_size)]
            pair = [MicroBatch(*(None if a is None else a[rows] for a in padded)) for rows in ranges]
            loss, gradient = loss_and_gradient(*pair)
            total = gradient if total is None else tree_map(mx.add, total, gradient)
            mx.eval(loss, total)
            losses.append(loss.item())
        count = len(losses)
        clipped, _ = optim.clip_grad_norm(tree_map(lambda g: g / count, total), 1.0)
        optimizer.update(network, clipped)
        mx.eval(network.trainable_parameters(), optimizer.state)
        seconds = time.perf_counter() - began
        return Turn(seconds, batch.tokens, sides.peak_memory_of_mlx(), padded.ids.size, sum(losses) / count)

    return turn


def compare(args: argparse.Namespace, model: str, rows: Path, batch_size: int) -> tuple[Side, Side, float]:
    """Return both sides after their turns, and the ratio."""
    steps = 1 + args.rounds
    kind = args.task, args.train_type
    how = args.micro_batch_tokens, args.compile, *kind, steps
    with Side("this toolkit", ours, model, rows, batch_size, args.max_length, *how) as our:
        name = LATE_NAME if args.task == "late" else NAMES[args.against]
        if args.against == "reference":
            # Steps of minutes: without warm-up, for what it compiles or allocates is nothing beside them.
            their = Side(name, reference, model, rows, args.reference_batch_size, args.max_length, warm_up=0)
        else:
            texts = sides.in_child(texts_of_batches, rows, batch_size, max(steps, 1 + sides.TRIALS))
            budget = best_budget(args.peer_tokens, model, texts, args.max_length, *kind)
            their = Side(name, sentence_transformers, model, texts, args.max_length, *kind, budget)
        with their:
            return our, their, sides.take_turns(our, their, args.rounds)


def best_budget(budgets: list[int], model: str, texts: list, max_length: int, task: str, train_type: str) -> int:
    """Return that of `budgets` with which the peer is fastest, alone on the machine, on a quarter of the batches."""
    quarter = [batch[: max(32, len(batch) // 4)] for batch in texts]

    def side(budget: int) -> Side:
        return Side(budget_name(budget), sentence_transformers, model, quarter, max_length, task, train_type, budget)

    return sides.fastest(budgets, side)


def budget_name(budget: int) -> str:
    return f"mini_batch_num_tokens={budget}" if budget else "mini-batches of 32 rows"


def table(pair: tuple[Side, Side], ratio: float) -> Iterator[str]:
    """Return the lines of one comparison."""
    width = max(len(side.name) for side in pair)
    head = f"{'':{width}}{'tokens/s':>10}{'least - most':>18}{'padding':>9}"
    yield f"{head}{'first s':>9}{'s a step':>10}{'loss':>9}{'peak MB':>9}"
    for side in pair:
        speeds = [turn.throughput for turn in side.measured]
        spread = f"{min(speeds):,.0f} - {max(speeds):,.0f}"
        padding = 1 - sum(t.tokens for t in side.turns) / sum(t.padded_tokens for t in side.turns)
        yield (
            f"{side.name:{width}}{side.median(lambda t: t.throughput):>10,.0f}{spread:>18}{padding:>9.1%}"
            f"{side.turns[0].seconds:>9.2f}{side.median(lambda t: t.seconds):>10.2f}{side.turns[0].value:>9.4f}"
            f"{side.turns[-1].peak_memory_bytes / 1e6:>9,.0f}"
        )
    yield f"ratio {ratio:.2f}"


def draw(results: dict[int, tuple[Side, Side, float]], title: str, caption: str, target: Path) -> None:
    """Draw the useful tokens a second of both sides against the batch: median, and a bar from lowest to highest."""
    from matplotlib.figure import Figure  # without pyplot: drawn by Agg, no windows

    figure = Figure(figsize=(8, 5.2), dpi=120, layout="constrained")
    panel = figure.subplots()
    sizes = list(results)
    for number, color in enumerate(("#1f6fb2", "#c8501e")):
        line = [result[number] for result in results.values()]
        middle = [side.median(lambda t: t.throughput) for side in line]
        spread = [[t.throughput for t in side.measured] for side in line]
        down = [m - min(s) for m, s in zip(middle, spread, strict=True)]
        up = [max(s) - m for m, s in zip(middle, spread, strict=True)]
        look = {"color": color, "marker": "o", "linewidth": 2.2, "capsize": 4}
        panel.errorbar(sizes, middle, [down, up], label=line[0].name, **look)
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.set_ylim(bottom=0)
    panel.set_xlabel("batch (rows that one loss sees)")
    panel.set_ylabel("useful tokens a second")
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#9aa5b1")
    panel.tick_params(which="both", color="#9aa5b1", labelcolor="#52606d")
    panel.grid(color="#e4e7eb")
    panel.legend(loc="lower right", frameon=False)
    figure.suptitle(title, weight="bold")
    lines = [part for line in caption.splitlines() for part in textwrap.wrap(line, 110)]
    figure.supxlabel("\n".join(lines), fontsize=7.5, color="#52606d")
    figure.savefig(target, format="png")


def tokens(text: str) -> int | str:
    """Parse a number of tokens, or "auto"."""
    return text if text == "auto" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", choices=NAMES, default="sentence-transformers", help="the other side")
    parser.add_argument("--task", choices=("embed", "late"), default="embed", help="late: one vector a token")
    parser.add_argument("--train-type", choices=("lora", "full"), default="lora", help="full: all weights")
    parser.add_argument("--model", default="minilm", help="minilm, gemma (270m's shape, random weights) or a folder")
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl")
    parser.add_argument("--batch-size", type=int, default=256, help="rows that one loss sees")
    parser.add_argument("--reference-batch-size", type=int, default=32, help="rows of a step of the reference design")
    parser.add_argument("--max-length", type=int, default=256, help="most tokens of a query and of a document")
    budget = "ours: tokens at once; auto = what has room; 0 = as it chooses"
    parser.add_argument("--micro-batch-tokens", type=tokens, default=0, metavar="N", help=budget)
    compiled = "ours: whether passes are compiled, as train.py's flag"
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help=compiled)
    peer = "theirs: mini_batch_num_tokens, the fastest of these; 0 = mini-batches of 32 rows (default: %(default)s)"
    parser.add_argument("--peer-tokens", type=int, nargs="+", default=PEER_TOKENS, metavar="N", help=peer)
    parser.add_argument("--rounds", type=int, default=3, help="measured turns of each side")
    parser.add_argument("--batches", metavar="N,N,...", help="compare at each of these batch sizes instead")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw throughput against the batch")
    args = parser.parse_args()
    sizes = [int(size) for size in args.batches.split(",")] if args.batches else [args.batch_size]
    if args.against == "reference" and (args.task, args.train_type) != ("embed", "lora"):
        parser.error("--against reference: only with --task embed and --train-type lora")
    model, machine = peers.model_folder(args.model), sides.machine()
    if args.task == "late":
        model = sides.in_child(peers.late_folder, model)
    print(machine)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = sides.write_distinct(args.data, Path(folder) / "rows.jsonl")
        for size in sizes:
            *pair, ratio = results[size] = compare(args, model, rows, size)
            kind = f"{args.task}, {args.train_type}"
            print(
                f"\n{args.model}, {kind}, batch {size}, up to {args.max_length} tokens, medians of {args.rounds} rounds"
            )
            print("\n".join(table(pair, ratio)), flush=True)
            if args.against == "reference":
                print(f"reference design: batch {args.reference_batch_size}, no warm-up; compare tokens/s, not steps")
            else:
                check_work(*pair, tolerance=5e-3 if "bfloat16" not in model else 5e-2)
    if len(sizes) > 1:
        print(f"\n{'batch':>6}{'ours tokens/s':>16}{'theirs tokens/s':>18}{'ratio':>8}")
        for size, (our, their, ratio) in results.items():
            speeds = [side.median(lambda t: t.throughput) for side in (our, their)]
            print(f"{size:>6}{speeds[0]:>16,.0f}{speeds[1]:>18,.0f}{ratio:>8.2f}")
    if args.picture:
        draw(results, f"Training {args.model} on MedQuAD ({args.task}, {args.train_type})", machine, args.picture)
        print(args.picture)


def check_work(our: Side, their: Side, tolerance: float) -> None:
    """End the script if the sides' work differs: in their tokens, or in their losses before any update."""
    tokens = [[turn.tokens for turn in side.turns] for side in (our, their)]
    if tokens[0] != tokens[1]:
        sys.exit(f"not the same texts: {tokens[0]} and {tokens[1]} tokens")
    difference = abs(our.turns[0].value - their.turns[0].value)
    if difference > tolerance:
        sys.exit(f"not the same work: first losses differ by {difference:.4f}, more than {tolerance:g}")
    print(f"same tokens; first losses differ by {difference:.1e}")


if __name__ == "__main__":
    main()
