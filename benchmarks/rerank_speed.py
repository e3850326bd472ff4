"""Rerankers: pairs a second, beside what a user would do otherwise.

    pip install -r benchmarks/requirements.txt
    python benchmarks/rerank_speed.py --data ../shared/data/medquad         # both, 10 minutes on 2 cores
    python benchmarks/rerank_speed.py --only qwen3 --layers 28 --rounds 1

- `--only cross-encoder`: all-MiniLM-L6-v2 with a new head beside sentence-transformers' CrossEncoder.predict with its
  best batch size of those that --peer-batch names. Questions of MedQuAD, each with an answer of its own and others of
  others. Both have the same files and limit, and sort by length.
- `--only qwen3`: a Qwen3 reranker whose prompt and query are computed once for all documents, beside the same toolkit
  with each pair in full. Qwen3-Reranker-0.6B's width, 4 of its 28 layers, random weights, one query, documents of
  random words of a token each; the prompt has its real text.

A turn scores all pairs, from texts to numpy scores, which must agree. Figures in benchmarks/README.md.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import sides
from sides import Side, Turn

Group = tuple[str, list[str]]
WIDTH = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
QUERY = "what helps against a stone in the kidney and how long does it last"
WORDS = [f"word{i}" for i in range(4_000)]


def pairs_of(groups: Sequence[Group]) -> int:
    return sum(len(documents) for _, documents in groups)


def ours(folder: str, groups: Sequence[Group], max_length: int, shares: bool = True) -> Callable[[int], Turn]:
    """Prepare this toolkit's side. `shares`: whether prompt and query are computed once, where the model allows it."""
    from mlx_retrieval import backend
    from mlx_retrieval.inference import reranker as inference_reranker

    backend.prepare()  # as commands do
    reranker = inference_reranker.Reranker(folder, max_length=max_length)
    if not shares:
        inference_reranker.SHARED_BY = pairs_of(groups) + 1

    def turn(_: int) -> Turn:
        began = time.perf_counter()
        scores = np.concatenate(reranker.score_groups(groups))
        return Turn(time.perf_counter() - began, len(scores), sides.peak_memory_of_mlx(), value=scores)

    return turn


# --- beside CrossEncoder.predict ------------------------------------------------------------------------------------


def make_cross_encoder(target: str) -> None:
    """Write all-MiniLM-L6-v2 with a seeded head of one score into the folder `target`."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(sides.minilm(), num_labels=1)
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(sides.minilm()).save_pretrained(target)


def sentence_transformers(folder: str, groups: Sequence[Group], max_length: int, batch: int) -> Callable[[int], Turn]:
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


def cross_encoder(args: argparse.Namespace, folder: str) -> None:
    """Compare with CrossEncoder.predict."""
    rows = sides.read_pairs(args.data)
    documents = [positive for _, positive in rows]
    groups = [
        (query, [positive, *documents[i + 1 : i + args.documents]])
        for i, (query, positive) in enumerate(rows[: args.queries])
    ]
    sides.in_child(make_cross_encoder, folder)

    def peer(batch: int) -> Side:
        return Side(f"batch_size={batch}", sentence_transformers, folder, groups[::4], args.max_length, batch)

    batch = sides.fastest(args.peer_batch, peer)
    our = Side("this toolkit", ours, folder, groups, args.max_length)
    their = Side("sentence-transformers", sentence_transformers, folder, groups, args.max_length, batch)
    compare(args, our, their, f"cross-encoder: {pairs_of(groups):,} pairs of up to {args.max_length} tokens")


# --- prompt and query once ------------------------------------------------------------------------------------------


def make_qwen3(target: str, layers: int) -> None:
    """Write a random Qwen3 with a tokenizer of whole words into the folder `target`."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    from mlx_retrieval.models.pair_tokenizers import INSTRUCTION, PREFIX, SUFFIX, body

    folder = Path(target)
    splitter = pre_tokenizers.Whitespace()
    text = " ".join((PREFIX, body(INSTRUCTION, QUERY, ""), SUFFIX, "yes no", *WORDS))
    vocabulary = dict.fromkeys(piece for piece, _ in splitter.pre_tokenize_str(text))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="word0"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "word1"}))
    shape = WIDTH | {"head_dim": 128, "num_hidden_layers": layers, "vocab_size": len(vocabulary)}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, tie_word_embeddings=True))
    model.save_pretrained(folder)


def sequence_lengths(folder: str, groups: Sequence[Group]) -> tuple[int, int]:
    """Return the tokens of the first pair's sequence, and how many of them all pairs share."""
    from mlx_retrieval.inference.reranker import Reranker

    reranker = Reranker(folder, max_length=1024)
    texts = reranker.tokenizer(groups).texts
    _, past = reranker._shared(texts)
    return int(texts.lengths[0]), past[0][0].shape[2]


def qwen3(args: argparse.Namespace, folder: str) -> None:
    """Compare prompt and query computed once with each pair in full."""
    sides.in_child(make_qwen3, folder, args.layers)
    drawn = np.random.default_rng(0).choice(WORDS, (2 * args.documents, args.words))
    groups = [(QUERY, [" ".join(row) for row in drawn])]
    length, shared = sides.in_child(sequence_lengths, folder, groups)
    once = Side("once", ours, folder, groups, 1024)
    full = Side("in full", ours, folder, groups, 1024, False)
    about = f"{pairs_of(groups)} sequences of {length} tokens, {shared} of them shared; {args.layers} layers"
    compare(args, once, full, f"qwen3: {about}")


# --- both -----------------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace, our: Side, their: Side, title: str) -> None:
    """Let two sides take turns and print pairs a second. The script ends if their scores differ."""
    with our, their:
        ratio = sides.take_turns(our, their, args.rounds)
    print(f"\n{title}; medians of {args.rounds} rounds")
    print(f"{'':22}{'pairs/s':>9}{'least - most':>18}{'peak MB':>9}")
    for side in (our, their):
        speeds = [turn.throughput for turn in side.measured]
        spread = f"{min(speeds):,.1f} - {max(speeds):,.1f}"
        peak = side.turns[-1].peak_memory_bytes / 1e6
        print(f"{side.name:22}{side.median(lambda turn: turn.throughput):>9,.1f}{spread:>18}{peak:>9,.0f}")
    apart = float(np.abs(our.turns[0].value - their.turns[0].value).max())
    print(f"ratio {ratio:.2f}, largest difference between scores {apart:.1e}", flush=True)
    if apart > 1e-3:
        sys.exit("the scores differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("cross-encoder", "qwen3"), help="one of both comparisons")
    parser.add_argument("--data", default="../shared/data/medquad", help="cross-encoder: folder with train.jsonl")
    parser.add_argument("--queries", type=int, default=20, help="cross-encoder: queries; qwen3 has one")
    parser.add_argument("--documents", type=int, default=50, help="of a query; qwen3 has twice as many")
    parser.add_argument("--max-length", type=int, default=256, help="cross-encoder: most tokens of a pair")
    batches = "theirs: batch_size, the fastest of these (default: %(default)s)"
    parser.add_argument("--peer-batch", type=int, nargs="+", default=(4, 8, 16, 32, 64, 128), metavar="N", help=batches)
    parser.add_argument("--layers", type=int, default=4, help="of the Qwen3")
    parser.add_argument("--words", type=int, default=100, help="qwen3: of a document, a token each")
    parser.add_argument("--rounds", type=int, default=5, help="measured turns of each side")
    args = parser.parse_args()

    print(sides.machine())
    for name, function in (("cross-encoder", cross_encoder), ("qwen3", qwen3)):
        if args.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                function(args, folder)


if __name__ == "__main__":
    main()
