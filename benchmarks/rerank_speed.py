"""What computing the prompt and the query once is worth: pairs a second of a qwen3 reranker, with and without.

    pip install -r benchmarks/requirements.txt
    python benchmarks/rerank_speed.py                       # Qwen3-Reranker-0.6B's width, 4 of its 28 layers
    python benchmarks/rerank_speed.py --layers 28 --rounds 1

Random weights, one query, documents of random words of a token each; the prompt has its real text. Both ways take turns
in one process and must give the same scores. Figures in benchmarks/README.md.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from mlx_retrieval import backend
from mlx_retrieval.inference import reranker as inference_reranker
from mlx_retrieval.models.pair_tokenizers import INSTRUCTION, PREFIX, SUFFIX, body

backend.prepare()  # as commands do

WIDTH = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
QUERY = "what helps against a stone in the kidney and how long does it last"


def make_model(folder: Path, layers: int) -> list[str]:
    """Write a random Qwen3 with a tokenizer of whole words into `folder`; returns the words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"word{i}" for i in range(4_000)]
    splitter = pre_tokenizers.Whitespace()
    text = " ".join((PREFIX, body(INSTRUCTION, QUERY, ""), SUFFIX, "yes no", *words))
    vocabulary = dict.fromkeys(piece for piece, _ in splitter.pre_tokenize_str(text))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="word0"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "word1"}))
    shape = WIDTH | {"head_dim": 128, "num_hidden_layers": layers, "vocab_size": len(vocabulary)}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, tie_word_embeddings=True))
    model.save_pretrained(folder)
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--words", type=int, default=100, help="of a document, a token each")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    folder = Path(tempfile.mkdtemp())
    words = make_model(folder, args.layers)
    documents = [" ".join(row) for row in np.random.default_rng(0).choice(words, (args.documents, args.words))]
    reranker = inference_reranker.Reranker(str(folder), max_length=1024)
    texts = reranker.tokenizer([(QUERY, documents)]).texts
    _, past = reranker._shared(texts)
    shared = past[0][0].shape[2]
    print(backend.describe())
    print(f"{args.documents} sequences of {texts.lengths[0]} tokens, {shared} of them shared; {args.layers} layers")

    scores, seconds = {}, {"once": [], "in full": []}
    for turn in range(args.rounds + 1):  # the first one makes graphs and kernels
        for way, least in (("once", inference_reranker.SHARED_BY), ("in full", args.documents + 1)):
            kept, inference_reranker.SHARED_BY = inference_reranker.SHARED_BY, least
            began = time.perf_counter()
            scores[way] = reranker.score(QUERY, documents)
            if turn:
                seconds[way].append(time.perf_counter() - began)
            inference_reranker.SHARED_BY = kept
    for way, spent in seconds.items():
        rates = sorted(args.documents / s for s in spent)
        print(f"{way:8} {statistics.median(rates):8.2f} pairs/s ({rates[0]:.2f} - {rates[-1]:.2f})")
    ratio = statistics.median(a / b for a, b in zip(seconds["in full"], seconds["once"], strict=True))
    apart = float(np.abs(scores["once"] - scores["in full"]).max())
    print(f"ratio {ratio:.2f}, largest difference between scores {apart:.1e}")
    if apart > 1e-3:
        sys.exit("the scores differ")


if __name__ == "__main__":
    main()
