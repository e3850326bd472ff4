"""Fit the numbers of mlx_retrieval/backbones/activations.py to the peaks of small random backbones.

    python benchmarks/activations.py --how plain --families bert qwen3        lines for that file's table

Each family is measured in ten random shapes, each with two and with five blocks: the difference is what a block keeps,
the rest is there once. Both are fitted by non-negative least squares to the widths of states, heads, keys,
feed-forward part and scores. Half an hour for one `--how`; bfloat16 takes most of it on CPUs.
"""

import argparse
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

HOWS = ("compiled", "plain", "checkpointed", "plain checkpointed")
FAMILIES = {"bert": "bert", "deberta": "deberta-v2", "modernbert": "modernbert", "t5": "t5", "gated t5": "mt5"}
EVEN = ("bert", "deberta", "modernbert")  # whose heads are together as wide as their states
FAMILIES |= {"llama": "llama", "qwen3": "qwen3", "gemma": "gemma3_text"}
BLOCKS = (2, 5)


def config_of(family: str, hidden: int, inner: int, heads: int, size: int, kv: int, layers: int) -> dict:
    """Return the config of a backbone of these sizes."""
    kind = FAMILIES[family]
    if kind in ("t5", "mt5"):
        sizes = {"d_model": hidden, "d_ff": inner, "num_heads": heads, "d_kv": size, "num_layers": layers}
        return {"model_type": kind, "vocab_size": 512} | sizes
    config = {"model_type": kind, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads}
    config |= {"num_hidden_layers": layers, "vocab_size": 512, "max_position_embeddings": 4096}
    if family == "deberta":  # as v3
        config |= {"relative_attention": True, "pos_att_type": "p2c|c2p", "share_att_key": True}
        config |= {"position_buckets": 256, "position_biased_input": False, "norm_rel_ebd": "layer_norm"}
        config |= {"max_relative_positions": 512}
    elif family not in EVEN:
        config |= {"head_dim": size, "num_key_value_heads": kv, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
        config |= {"tie_word_embeddings": True, "sliding_window": 4096, "sliding_window_pattern": 2}
        config |= {"query_pre_attn_scalar": size}
    return config


def measure(config: dict, how: str, train_type: str, half: bool, rows: int, width: int) -> float:
    """Return the numbers that the passes of a micro-batch take at their peak, gradients of weights not counted."""
    from mlx_retrieval.backend import mx

    from mlx.utils import tree_flatten, tree_map

    from mlx_retrieval.backbones import ENCODERS, bert, deberta, decoder, lora, modernbert, t5
    from mlx_retrieval.backbones.gradient_checkpointing import checkpoint_blocks
    from mlx_retrieval.models.batching import MicroBatch
    from mlx_retrieval.models.heads import EmbeddingHead, RetrievalModel
    from mlx_retrieval.models.runners import make_runner

    if config["model_type"] in ENCODERS:
        classes = {bert: bert.Bert, deberta: deberta.Deberta, modernbert: modernbert.ModernBert, t5: t5.T5}
        backbone = classes[ENCODERS[config["model_type"]]](config)
    else:
        model, arguments = decoder._classes(config)
        backbone = decoder.Decoder(model(arguments.from_dict(config)), config)
    if half:
        backbone.update(tree_map(lambda v: v.astype(mx.bfloat16), backbone.parameters()))
    backbone.freeze()
    lora.adapt(backbone, train_type, rank=1)
    if "checkpointed" in how:
        checkpoint_blocks(backbone)
    model = RetrievalModel(backbone, EmbeddingHead())
    model.train()
    mx.eval(model.parameters())
    runner = make_runner(model)
    lengths = mx.full((rows,), width).astype(mx.int32)
    batch = MicroBatch(mx.random.randint(0, 500, (rows, width)), lengths, mx.zeros_like(lengths), lengths)
    cotangent = mx.ones((rows, backbone.hidden_size))
    mx.eval(*batch[:4], cotangent)
    for _ in range(2):  # the first pass also compiles
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        runner.gradient([batch], [0], [cotangent])
        peak = mx.get_peak_memory() - before
    peak -= runner.held_bytes(rows * width, rows * width)
    if train_type == "full" and "checkpointed" not in how:
        peak -= sum(value.nbytes for _, value in tree_flatten(model.trainable_parameters()))
    return peak / (2 if half else 4)


def fit(family: str, how: str, train_type: str, half: bool, shapes: int) -> tuple[list[float], list[float], float]:
    """Return the numbers of each width that a block keeps, those that are there once, and the largest error."""
    import numpy as np
    from scipy.optimize import nnls

    rng = random.Random(family)
    widths, peaks = [], []
    encoder = family in EVEN
    for _ in range(shapes):
        size, heads = rng.choice([8, 16, 32]), rng.choice([2, 4, 6, 8])
        hidden = size * heads if encoder else rng.choice([48, 64, 96, 128])
        kv = rng.choice([n for n in (1, 2, heads) if heads % n == 0])
        inner, width = int(hidden * rng.choice([1.5, 2, 3, 4])), rng.choice([16, 32, 64, 128, 256])
        rows = 1024 // width
        attention = 0 if encoder else size * heads
        keys = 0 if encoder or "t5" in family else size * kv
        widths.append([rows * width * n for n in (hidden, attention, keys, inner, heads * width)])
        configs = [config_of(family, hidden, inner, heads, size, kv, layers) for layers in BLOCKS]
        peaks.append([measure(config, how, train_type, half, rows, width) for config in configs])
    x, (few, many) = np.array(widths, float), np.array(peaks).T
    if "checkpointed" in how:  # a block keeps its input, and perhaps a copy of it
        columns = np.vstack([np.hstack([n * x[:, :1], x]) for n in BLOCKS])
        values = np.concatenate([few, many])
        found, _ = nnls(columns / values[:, None], np.ones(len(values)))
        return [found[0], 0, 0, 0, 0], list(found[1:]), float(np.abs(columns @ found / values - 1).max())
    slope = (many - few) / (BLOCKS[1] - BLOCKS[0])
    block, _ = nnls(x / slope[:, None], np.ones(len(slope)))
    once, _ = nnls(x / many[:, None], (few - BLOCKS[0] * (x @ block)) / many)
    return list(block), list(once), float(np.abs((BLOCKS[1] * (x @ block) + x @ once) / many - 1).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--how", choices=HOWS, default="compiled")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--shapes", type=int, default=10)
    args = parser.parse_args()
    if args.how.startswith("plain"):
        os.environ["MLX_RETRIEVAL_PLAIN"] = "1"
    from mlx_retrieval import backend

    backend.prepare()
    for family in args.families:
        for train_type in ("lora",) if "checkpointed" in args.how else ("lora", "full"):
            for half in (False, True) if args.how.startswith("plain") else (False,):
                block, once, error = fit(family, args.how, train_type, half, args.shapes)
                name = args.how + " full" * (train_type == "full") + " half" * half
                numbers = ", ".join(f"({', '.join(f'{n:.1f}' for n in each)})" for each in (block, once))
                print(f'{family}: "{name}": ({numbers}),  # error {error:.0%}', flush=True)


if __name__ == "__main__":
    main()
