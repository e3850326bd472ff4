"""Embedding: texts and useful tokens a second, and the time of a single query, beside sentence-transformers.

    pip install -r benchmarks/requirements.txt
    python benchmarks/embed_speed.py --data ../shared/data/medquad
    python benchmarks/embed_speed.py --texts 500 --rounds 1
    python benchmarks/embed_speed.py --texts 600 --profile             where both sides' time goes (Linux, needs perf)

The first answers of MedQuAD; both sides have the same weights and limit and sort by length themselves. Of the batch
sizes that --peer-batch names, the peer gets that with which it is fastest on a tenth of the texts. A turn is a call of
`encode`, from texts to numpy vectors, which must agree; the first one, which also compiles and allocates, is reported
separately. Then both embed queries one at a time: the median of a turn's calls. Figures in benchmarks/README.md.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import peers
import samples
import sides
from sides import Side, Turn

PEER_BATCHES = (4, 8, 16, 32, 64, 128)


def ours(
    folder: str, texts: list[str], max_length: int, single: bool, batch_tokens: int | None, compile: str
) -> Callable[[int], Turn]:
    from mlx_retrieval import backend
    from mlx_retrieval.inference import embedder

    backend.prepare()  # as commands do
    backend.set_compile(compile)
    model = embedder.load(folder, max_length=max_length)
    tokens = int(model.tokenizer(texts, "document").lengths.sum())

    def encode(texts: list[str]) -> np.ndarray:
        return model.encode(texts, prompt="document", show_progress=False, batch_tokens=batch_tokens)

    return timed(encode, texts, single, tokens, sides.peak_memory_of_mlx)


def sentence_transformers(
    folder: str, texts: list[str], max_length: int, single: bool, batch: int
) -> Callable[[int], Turn]:
    model = peers.sentence_transformer(folder, max_length)
    tokens = sum(int(model.preprocess([text])["attention_mask"].sum()) for text in texts)

    def encode(texts: list[str]) -> np.ndarray:  # the vectors come to the CPU, so nothing is left to wait for on a GPU
        return model.encode(texts, batch_size=batch, normalize_embeddings=True, show_progress_bar=False)

    return timed(encode, texts, single, tokens, sides.peak_memory_of_torch)


def timed(encode: Callable, texts: list[str], single: bool, tokens: int, peak: Callable[[], int]) -> Callable:
    """Return a turn: all texts in one call, or each in its own, whose seconds are then the median of the calls."""

    def turn(_: int) -> Turn:
        seconds, vectors = [], []
        for part in [[text] for text in texts] if single else [texts]:
            began = time.perf_counter()
            vectors.append(encode(part))
            seconds.append(time.perf_counter() - began)
        return Turn(statistics.median(seconds), tokens, peak(), value=np.concatenate(vectors))

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm", help="minilm, gemma (270m's shape, random weights) or a folder")
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl")
    parser.add_argument("--texts", type=int, default=5_000, help="embed the first so many answers")
    parser.add_argument("--queries", type=int, default=200, help="embed the first so many questions one at a time")
    parser.add_argument("--max-length", type=int, default=256, help="most tokens of a text")
    parser.add_argument("--batch-tokens", type=int, metavar="N", help="ours: tokens at once; default: what it chooses")
    compiled = "ours: whether passes are compiled, as embed.py's flag"
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help=compiled)
    batches = "theirs: batch_size, the fastest of these (default: %(default)s)"
    parser.add_argument("--peer-batch", type=int, nargs="+", default=PEER_BATCHES, metavar="N", help=batches)
    parser.add_argument("--rounds", type=int, default=3, help="measured turns of each side")
    parser.add_argument("--profile", action="store_true", help="print where the time of both sides goes instead")
    args = parser.parse_args()

    pairs = sides.read_pairs(args.data)
    folder = peers.model_folder(args.model)
    print(sides.machine())
    texts = [positive for _, positive in pairs[: args.texts]]

    def peer(batch: int) -> Side:
        few = texts[:: max(1, min(10, len(texts) // 200))]
        return Side(f"batch_size={batch}", sentence_transformers, folder, few, args.max_length, False, batch)

    batch = sides.fastest(args.peer_batch, peer)
    queries = list(dict.fromkeys(query for query, _ in pairs))[: args.queries]
    for embedded, single in ((texts, False), (queries, True)):
        if embedded and args.profile:
            given, how = (folder, embedded, args.max_length, single), (args.batch_tokens, args.compile)
            our = sides.in_child(profiled, ours, args.rounds, *given, *how)
            their = sides.in_child(profiled, sentence_transformers, args.rounds, *given, batch)
            compare_profiles("queries, one at a time" if single else "texts", {"this toolkit": our, "the peer": their})
        elif embedded:
            compare(args, folder, embedded, single, batch)


def profiled(side: Callable, rounds: int, *given) -> tuple[Counter[str], float]:
    """Return the milliseconds of a core for 1,000 tokens by kind of work, and the share of the cores that was busy.

    `side` is `ours` or `sentence_transformers`, computed in this process on `given`.
    """
    turn = side(*given)
    turn(0)
    turns: list[Turn] = []
    seconds, busy = samples.profile(lambda: turns.extend(turn(number) for number in range(rounds)))
    tokens = sum(each.tokens for each in turns)
    return Counter({kind: 1e6 * each / tokens for kind, each in seconds.items()}), busy


def compare_profiles(title: str, profiles: dict[str, tuple[Counter[str], float]]) -> None:
    """Print the profiles of both sides, one beside the other."""
    print(f"\n{title}: ms of a core for 1,000 tokens\n" + "".join(f"{side:>14}" for side in profiles))
    kinds = set().union(*(found for found, _ in profiles.values()))
    for kind in sorted(kinds, key=lambda kind: -max(found[kind] for found, _ in profiles.values())):
        print("".join(f"{found[kind]:14.1f}" for found, _ in profiles.values()) + f"  {kind}")
    print("".join(f"{found.total():14.1f}" for found, _ in profiles.values()) + "  all")
    print("".join(f"{busy:14.0%}" for _, busy in profiles.values()) + "  of the cores busy")


def compare(args: argparse.Namespace, folder: str, texts: list[str], single: bool, batch: int) -> None:
    """Let both sides embed `texts` in turn, print the table, and end the script if the vectors differ."""
    given = folder, texts, args.max_length, single
    with (
        Side("this toolkit", ours, *given, args.batch_tokens, args.compile) as our,
        Side("sentence-transformers", sentence_transformers, *given, batch) as their,
    ):
        ratio = sides.take_turns(our, their, args.rounds)

    kind = "queries, one at a time" if single else f"texts of up to {args.max_length} tokens"
    print(f"\n{args.model}, {len(texts):,} {kind}, medians of {args.rounds} rounds")
    print(table((our, their), len(texts), single))
    cosine = (our.turns[0].value * their.turns[0].value).sum(axis=1).min()
    print(f"ratio {ratio:.2f}, least cosine between both sides' vectors {cosine:.7f}", flush=True)
    least = 0.9999 if "bfloat16" not in folder else 0.99
    if cosine < least:
        sys.exit(f"the vectors differ: a cosine below {least:g}")


def table(pair: tuple[Side, Side], count: int, single: bool) -> str:
    """Return the lines of both sides: speeds, or of single queries their times."""
    if single:
        lines = [f"{'':22}{'p50 ms':>9}{'least - most':>18}"]
        for side in pair:
            times = [1000 * turn.seconds for turn in side.measured]
            spread = f"{min(times):.2f} - {max(times):.2f}"
            lines.append(f"{side.name:22}{statistics.median(times):>9.2f}{spread:>18}")
        return "\n".join(lines)
    lines = [f"{'':22}{'texts/s':>9}{'tokens/s':>10}{'least - most':>18}{'seconds':>9}{'first s':>9}{'peak MB':>9}"]
    for side in pair:
        speeds = [turn.throughput for turn in side.measured]
        seconds = side.median(lambda turn: turn.seconds)
        lines.append(
            f"{side.name:22}{count / seconds:>9,.1f}{side.median(lambda turn: turn.throughput):>10,.0f}"
            f"{f'{min(speeds):,.0f} - {max(speeds):,.0f}':>18}{seconds:>9.2f}"
            f"{side.turns[0].seconds:>9.2f}{side.turns[-1].peak_memory_bytes / 1e6:>9,.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
