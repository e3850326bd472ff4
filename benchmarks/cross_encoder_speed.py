"""Cross-encoders: pairs a second, beside sentence-transformers' CrossEncoder with its best batch size.

    pip install -r benchmarks/requirements.txt
    python benchmarks/cross_encoder_speed.py --data ../shared/data/medquad
    python benchmarks/cross_encoder_speed.py --queries 4 --rounds 1

all-MiniLM-L6-v2 with a new head, and questions of MedQuAD with answers of their own and of others. Both sides have the
same files and limit; both sort by length. Of the batch sizes that --peer-batch names, the peer gets that with which it
is fastest. A turn scores all pairs, from texts to numpy scores, which must agree. Figures in benchmarks/README.md.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import sides
from sides import Side, Turn

Group = tuple[str, list[str]]


def make_model(target: str) -> None:
    """Write all-MiniLM-L6-v2 with a seeded head of one score into the folder `target`."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(sides.minilm(), num_labels=1)
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(sides.minilm()).save_pretrained(target)


def ours(folder: str, groups: list[Group], max_length: int) -> Callable[[int], Turn]:
    from mlx_retrieval import backend
    from mlx_retrieval.inference.reranker import Reranker

    backend.prepare()  # as commands do
    reranker = Reranker(folder, max_length=max_length)

    def turn(_: int) -> Turn:
        began = time.perf_counter()
        scores = reranker.score_groups(groups)
        return Turn(
            time.perf_counter() - began, pairs_of(groups), sides.peak_memory_of_mlx(), value=np.concatenate(scores)
        )

    return turn


def sentence_transformers(folder: str, groups: list[Group], max_length: int, batch: int) -> Callable[[int], Turn]:
    import torch
    from sentence_transformers import CrossEncoder

    torch.set_num_threads(sides.cores())
    gpu = torch.accelerator.current_accelerator(check_available=True)
    model = CrossEncoder(folder, max_length=max_length, device=str(gpu or "cpu"))
    pairs = [(query, document) for query, documents in groups for document in documents]

    def turn(_: int) -> Turn:
        began = time.perf_counter()
        scores = model.predict(pairs, batch_size=batch, show_progress_bar=False)
        return Turn(time.perf_counter() - began, len(pairs), sides.peak_memory_of_torch(), value=scores)

    return turn


def pairs_of(groups: list[Group]) -> int:
    return sum(len(documents) for _, documents in groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl")
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--documents", type=int, default=50, help="of each query")
    parser.add_argument("--max-length", type=int, default=256, help="most tokens of a pair")
    batches = "theirs: batch_size, the fastest of these (default: %(default)s)"
    parser.add_argument("--peer-batch", type=int, nargs="+", default=(4, 8, 16, 32, 64, 128), metavar="N", help=batches)
    parser.add_argument("--rounds", type=int, default=5, help="measured turns of each side")
    args = parser.parse_args()

    rows = sides.read_pairs(args.data)
    documents = [positive for _, positive in rows]
    groups = [
        (query, [positive, *documents[i + 1 : i + args.documents]])
        for i, (query, positive) in enumerate(rows[: args.queries])
    ]
    print(sides.machine())
    with tempfile.TemporaryDirectory() as folder:
        sides.in_child(make_model, folder)

        def peer(batch: int) -> Side:
            return Side(f"batch_size={batch}", sentence_transformers, folder, groups[::4], args.max_length, batch)

        batch = sides.fastest(args.peer_batch, peer)
        with (
            Side("this toolkit", ours, folder, groups, args.max_length) as our,
            Side("sentence-transformers", sentence_transformers, folder, groups, args.max_length, batch) as their,
        ):
            ratio = sides.take_turns(our, their, args.rounds)

    print(f"\n{pairs_of(groups):,} pairs of up to {args.max_length} tokens, medians of {args.rounds} rounds")
    print(f"{'':22}{'pairs/s':>9}{'least - most':>18}{'peak MB':>9}")
    for side in (our, their):
        speeds = [turn.throughput for turn in side.measured]
        spread = f"{min(speeds):,.1f} - {max(speeds):,.1f}"
        peak = side.turns[-1].peak_memory_bytes / 1e6
        print(f"{side.name:22}{side.median(lambda turn: turn.throughput):>9,.1f}{spread:>18}{peak:>9,.0f}")
    apart = float(np.abs(our.turns[0].value - their.turns[0].value).max())
    print(f"ratio {ratio:.2f}, largest difference between scores {apart:.1e}")
    if apart > 1e-3:
        sys.exit("the scores differ")


if __name__ == "__main__":
    main()
