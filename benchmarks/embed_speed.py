"""Embedding: texts and useful tokens a second, beside sentence-transformers.

    pip install -r benchmarks/requirements.txt
    python benchmarks/embed_speed.py --data ../shared/data/medquad
    python benchmarks/embed_speed.py --texts 500 --rounds 1

The first answers of MedQuAD; both sides have the same weights and limit and sort by length themselves. A turn is one
call of `encode`, from texts to numpy vectors, which must agree; the first one, which also compiles and allocates, is
reported separately. Figures in benchmarks/README.md.
"""

import argparse
import sys
import time
from collections.abc import Callable

import sides
from sides import Side, Turn


def ours(
    folder: str, texts: list[str], max_length: int, batch_tokens: int | None, compile: str
) -> Callable[[int], Turn]:
    from mlx_retrieval import backend
    from mlx_retrieval.inference import embedder

    backend.prepare()  # as commands do
    backend.set_compile(compile)
    model = embedder.load(folder, max_length=max_length)
    tokens = int(model.tokenizer(texts, "document").lengths.sum())

    def turn(_: int) -> Turn:
        began = time.perf_counter()
        vectors = model.encode(texts, prompt="document", show_progress=False, batch_tokens=batch_tokens)
        seconds = time.perf_counter() - began
        return Turn(seconds, tokens, sides.peak_memory_of_mlx(), value=vectors)

    return turn


def sentence_transformers(folder: str, texts: list[str], max_length: int) -> Callable[[int], Turn]:
    model = sides.sentence_transformer(folder, max_length)
    tokens = sum(int(model.preprocess([text])["attention_mask"].sum()) for text in texts)

    def turn(_: int) -> Turn:
        began = time.perf_counter()  # the vectors come to the CPU, so nothing is left to wait for on a GPU
        vectors = model.encode(texts, batch_size=32, normalize_embeddings=True, show_progress_bar=False)
        seconds = time.perf_counter() - began
        return Turn(seconds, tokens, sides.peak_memory_of_torch(), value=vectors)

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm", help="minilm, gemma (270m's shape, random weights) or a folder")
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl")
    parser.add_argument("--texts", type=int, default=5_000, help="embed the first so many answers")
    parser.add_argument("--max-length", type=int, default=256, help="most tokens of a text")
    parser.add_argument("--batch-tokens", type=int, metavar="N", help="ours: tokens at once; default: what it chooses")
    compiled = "ours: whether passes are compiled, as embed.py's flag"
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help=compiled)
    parser.add_argument("--rounds", type=int, default=3, help="measured turns of each side")
    args = parser.parse_args()

    texts = [positive for _, positive in sides.read_pairs(args.data)[: args.texts]]
    folder = sides.model_folder(args.model)
    print(sides.machine())
    with (
        Side("this toolkit", ours, folder, texts, args.max_length, args.batch_tokens, args.compile) as our,
        Side("sentence-transformers", sentence_transformers, folder, texts, args.max_length) as their,
    ):
        ratio = sides.take_turns(our, their, args.rounds)

    print(f"\n{args.model}, {len(texts):,} texts of up to {args.max_length} tokens, medians of {args.rounds} rounds")
    print(f"{'':22}{'texts/s':>9}{'tokens/s':>10}{'least - most':>18}{'seconds':>9}{'first s':>9}{'peak MB':>9}")
    for side in (our, their):
        speeds = [turn.throughput for turn in side.measured]
        seconds = side.median(lambda turn: turn.seconds)
        print(
            f"{side.name:22}{len(texts) / seconds:>9,.1f}{side.median(lambda turn: turn.throughput):>10,.0f}"
            f"{f'{min(speeds):,.0f} - {max(speeds):,.0f}':>18}{seconds:>9.2f}"
            f"{side.turns[0].seconds:>9.2f}{side.turns[-1].peak_memory_bytes / 1e6:>9,.0f}"
        )
    cosine = (our.turns[0].value * their.turns[0].value).sum(axis=1).min()
    print(f"ratio {ratio:.2f}, least cosine between both sides' vectors {cosine:.7f}")
    least = 0.9999 if "bfloat16" not in folder else 0.99
    if cosine < least:
        sys.exit(f"the vectors differ: a cosine below {least:g}")


if __name__ == "__main__":
    main()
