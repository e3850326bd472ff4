"""The machine's limit: how many tokens a second its matrix products allow at most, and the share that is reached.

    python benchmarks/limit.py --data ../shared/data/medquad
    python benchmarks/limit.py --model FOLDER --texts 300 --batch-size 64 --rounds 5
    python benchmarks/limit.py --task late --batch-size 64     training with a vector for each token
    python benchmarks/limit.py --profile                       and where the rest of the time goes (Linux, needs perf)

1. GFLOP/s of float32 products of the model's own shapes, computed by the toolkit's own worker threads or one at a time
   by all cores of the BLAS, whichever is faster. Nothing else is computed meanwhile: no step can be faster than this.
2. FLOP that a token needs at least. Embedding: 2 for each weight of the linear layers, and 4 times length * width in
   each layer for attention. Training with LoRA: the same once more for the gradients that pass through frozen weights
   (twice for attention), and three times the adapters'. Gradient caching computes the forward pass twice, less the
   products that are kept; the least is counted, once, and beside it the figure with what is computed twice here.
3. Useful tokens a second, measured, over the limit.

Only the backbone's products are counted, so a share of 100 % is out of reach: norms, activations, softmax, rotations,
the loss and the optimizer take time and no FLOP here. Figures in benchmarks/README.md.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlx_retrieval.backend import mx, nn

import peers
import samples
import sides
import train_speed

from mlx_retrieval import backend
from mlx_retrieval.inference import embedder
from mlx_retrieval.models import cpu_model_runner

backend.prepare()  # as commands do
SECONDS = 0.4  # of each measurement of a product
Shape = tuple[int, int]


def linear_shapes(backbone: nn.Module) -> Counter[Shape]:
    """Return how many linear layers of each shape (outputs, inputs) the blocks have, adapters aside."""
    layers = [module for block in backbone.layers for module in block.modules() if isinstance(module, nn.Linear)]
    return Counter(layer.weight.shape for layer in layers)


def adapter_size(backbone: nn.Module) -> int:
    """Return the number of the adapters' weights."""
    return sum(
        module.lora_a.size + module.lora_b.size
        for block in backbone.layers
        for module in block.modules()
        if hasattr(module, "lora_a")
    )


def speeds(shapes: Counter[Shape], rows: int) -> dict[str, float]:
    """Return FLOP/s over all products `(rows, inputs) @ (inputs, outputs)`: by worker threads, and by all cores."""
    inputs = {n: mx.random.normal((rows, n)) for n in {shape[1] for shape in shapes}}
    weights = {shape: mx.random.normal(shape) for shape in shapes}
    mx.eval(inputs, weights)
    flop = sum(2 * rows * out * into * count for (out, into), count in shapes.items())

    def products() -> None:
        for (out, into), count in shapes.items():
            for _ in range(count):
                mx.eval(inputs[into] @ weights[out, into].T)

    def once(threads: int) -> None:
        if threads == 1:
            return products()
        with backend.blas.one_thread(threads):
            for future in [worker.submit(products) for worker in cpu_model_runner._workers()]:
                future.result()

    found = {}
    for name, threads in {"worker threads": backend.WORKERS, "all cores of the BLAS": 1}.items():
        once(threads)
        count, began = 0, time.perf_counter()
        while (spent := time.perf_counter() - began) < SECONDS:
            once(threads)
            count += threads
        found[name] = flop * count / spent
    return found


def flop_of_a_token(shapes: Counter[Shape], adapters: int, attention: float, kind: str, kept: float = 1.0) -> float:
    """Return the least FLOP for a token.

    Args:
        adapters: number of the adapters' weights.
        attention: FLOP of a token's attention products in the forward pass.
        kind: `forward`, `training` (the forward pass once), or `repeated` (twice, less what is kept).
        kept: share of the tokens whose products with weights are kept for the gradient; attention's never are.
    """
    linear = sum(2 * out * into * count for (out, into), count in shapes.items())
    forward = linear + attention
    if kind == "forward":
        return forward
    backward = linear + 2 * attention
    return forward + backward + 3 * 2 * adapters + ((1 - kept) * linear + attention if kind == "repeated" else 0)


def attention_flop(backbone: nn.Module, width: int, lengths: Sequence[int]) -> float:
    """Return the mean FLOP of a token's attention in all layers, for texts of `lengths` tokens; causal ones half."""
    squares = sum(length**2 for length in lengths)
    causal = 1.0 if getattr(backbone, "bidirectional", True) else 0.5
    return causal * 4 * width * len(backbone.layers) * squares / sum(lengths)


def attention_width(backbone: nn.Module) -> int:
    """Return heads * width of a head: what the products of queries with keys sum over."""
    names = ("q_proj", "query_proj", "q_lin", "query", "Wq")
    for name, module in backbone.layers[0].named_modules():
        if name.rsplit(".", 1)[-1] in names and isinstance(module, nn.Linear):
            return module.weight.shape[0]
    return max(shape[1] for shape in linear_shapes(backbone) if shape[0] >= shape[1])  # fused: its input's width


def count_kept() -> Counter[str]:
    """Return a count, from now on, of the tokens ("all") of steps, and of those whose products are kept ("kept")."""
    tokens, choose = Counter(), cpu_model_runner.CpuModelRunner._worth_saving

    def counting(self, micro_batches: Sequence) -> set[int]:
        chosen = choose(self, micro_batches)
        tokens["all"] += sum(each.ids.size for each in micro_batches)
        tokens["kept"] += sum(micro_batches[i].ids.size for i in chosen)
        return chosen

    cpu_model_runner.CpuModelRunner._worth_saving = counting
    return tokens


def best(function: Callable[[], float], rounds: int) -> tuple[float, float, float]:
    """Return median, least and most of `rounds` calls after one that does not count."""
    function()
    found = [function() for _ in range(rounds)]
    return statistics.median(found), min(found), max(found)


def report(name: str, measured: tuple[float, float, float], flops: float, least: float, repeated: float = 0) -> None:
    """Print tokens a second, the limit, and the share of it; `repeated`: FLOP with what is computed twice."""
    median, low, high = measured
    line = f"{name:24}{median:>10,.0f}{f'{low:,.0f} - {high:,.0f}':>20}"
    line += f"{flops / least:>12,.0f}{median * least / flops:>8.0%}"
    if repeated:
        line += f"   with what is computed twice: {flops / repeated:,.0f}, {median * repeated / flops:.0%}"
    print(line, flush=True)


def print_profile(name: str, function: Callable[[], float], rounds: int) -> None:
    """Print which share of the cores' time each kind of work takes, and how much of it they are busy."""
    seconds, busy = samples.profile(lambda: [function() for _ in range(rounds)])
    print(f"\n{name}: where the time goes; {backend.blas.cores()} cores, {busy:.0%} busy")
    for kind, each in seconds.most_common():
        print(f"{each / seconds.total():8.1%}  {kind}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm", help="minilm, gemma (270m's shape, random weights) or a folder")
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl")
    parser.add_argument("--texts", type=int, default=1_000, help="embed the first so many answers")
    parser.add_argument(
        "--task", choices=("embed", "late"), default="embed", help="of training; late: a vector a token"
    )
    parser.add_argument("--batch-size", type=int, default=256, help="rows of a training step")
    parser.add_argument("--max-length", type=int, default=256, help="most tokens of a text")
    parser.add_argument("--rounds", type=int, default=5, help="measured turns")
    parser.add_argument("--profile", action="store_true", help="print where the time goes; Linux, needs perf")
    args = parser.parse_args()

    folder = peers.model_folder(args.model)
    print(sides.machine())
    model = embedder.load(folder, max_length=args.max_length)
    backbone = model.model.backbone
    shapes, width = linear_shapes(backbone), attention_width(backbone)
    texts = [positive for _, positive in sides.read_pairs(args.data)[: args.texts]]
    lengths = model.tokenizer(texts, "document").lengths.tolist()

    print(f"\nproducts of {backend.MICRO_BATCH_TOKENS:,} tokens, GFLOP/s, medians of {args.rounds} rounds")
    rounds = [speeds(shapes, backend.MICRO_BATCH_TOKENS) for _ in range(args.rounds)]
    middle = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    for name, flops in middle.items():
        print(f"{name:24}{flops / 1e9:>10,.0f}")
    flops = max(middle.values())

    print(f"\n{'tokens/s':24}{'median':>10}{'least - most':>20}{'limit':>12}{'share':>8}")

    def embed() -> float:
        began = time.perf_counter()
        model.encode(texts, prompt="document", show_progress=False)
        return sum(lengths) / (time.perf_counter() - began)

    least = flop_of_a_token(shapes, 0, attention_flop(backbone, width, lengths), "forward")
    report(f"embedding {len(texts):,} texts", best(embed, args.rounds), flops, least)
    if args.profile:
        print_profile("embedding", embed, args.rounds)

    with tempfile.TemporaryDirectory() as scratch:
        rows = sides.write_distinct(args.data, Path(scratch) / "rows.jsonl")
        trainer = train_speed.prepared(folder, rows, args.batch_size, args.max_length, task=args.task).trainer
        stream, trained_lengths = trainer.batches.stream(0, 2 * args.rounds + 3), []
        steps = itertools.count(1)

        tokens_of = count_kept()

        def train() -> float:
            batch = next(stream)
            trained_lengths.extend(batch.texts.lengths.tolist())
            began = time.perf_counter()
            tokens = trainer.update(batch, next(steps))["tokens"]
            return tokens / (time.perf_counter() - began)

        measured = best(train, args.rounds)
        attention, adapters = attention_flop(backbone, width, trained_lengths), adapter_size(trainer.model.backbone)
        kept = tokens_of["kept"] / max(1, tokens_of["all"])
        kinds = [flop_of_a_token(shapes, adapters, attention, kind, kept) for kind in ("training", "repeated")]
        report(f"training, {args.task}, batch {args.batch_size}", measured, flops, *kinds)
        print(f"products with weights are kept for the gradient for {kept:.0%} of the tokens")
        if args.profile:
            print_profile("training", train, args.rounds)


if __name__ == "__main__":
    main()
