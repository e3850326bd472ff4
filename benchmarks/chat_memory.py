"""Peak memory and speed of chat fine-tuning by its settings, beside the estimate that a run prints.

    python benchmarks/chat_memory.py                      the table of docs/chat.md, some minutes
    python benchmarks/chat_memory.py --hidden 64 --layers 2 --length 64       a quick look
    python benchmarks/chat_memory.py --model smollm2                          a real model

A Llama with random weights, or a real model in float32 and converted to 4 bits by mlx-lm; LoRA r = 16, conversations of
equal lengths; the second and third of three steps, each case in a process of its own. Figures in docs/chat.md and in
benchmarks/README.md.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sides import ROOT, in_child, smollm2


def random_llama(folder: Path, hidden: int, layers: int, vocabulary: int, bits: int = 0, seed: int = 0) -> None:
    """Write a Llama with random weights and the embedded model's tokenizer; `bits`: 4 or 8, 0 = float32."""
    from mlx_retrieval.backend import mx

    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.utils import quantize_model

    from mlx_retrieval import backend  # noqa: F401  (before mlx)

    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 3 * hidden,
    }
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": hidden // 8, "vocab_size": vocabulary}
    config |= {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 2048, "tie_word_embeddings": True}
    config |= {"eos_token_id": [1, 7]}
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(config))
    model.update(tree_map(lambda v: v if v.ndim == 1 else 0.03 * mx.random.normal(v.shape), model.parameters()))
    if bits:
        model, config = quantize_model(model, config, group_size=64, bits=bits)
    folder.mkdir(parents=True)
    for file in (ROOT / "gemma-3-tiny-mlx").glob("tokenizer*.json"):
        shutil.copy(file, folder)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def converted(source: str, folder: Path, bits: int) -> None:
    """Write a real model's folder for mlx-lm, in float32 or in `bits` by mlx-lm's own conversion."""
    from mlx_retrieval import backend

    backend.prepare()

    from mlx_lm import convert

    convert(source, str(folder), quantize=bits > 0, q_bits=bits or None, dtype="float32")


def conversations(folder: Path, length: int, count: int = 16) -> None:
    """Write `train.jsonl` with conversations of about `length` tokens or more, from the toolkit's texts."""
    rows = [json.loads(line) for line in (ROOT / "train-data.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = itertools.cycle(row["document"] for row in rows)
    folder.mkdir(parents=True)
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for row in rows[:count]:
            answer = ""
            while len(answer) < 8 * length:  # cut there, whatever the tokenizer makes of it
                answer += next(texts) + " "
            file.write(json.dumps({"prompt": row["query"], "completion": answer}) + "\n")


def measure(folder: str, bits: int, num_layers: int, grad_checkpoint: bool, batch: int, length: int) -> dict:
    """Measure one case; return its peak and estimate in bytes, and its tokens/s."""
    from mlx_retrieval import backend
    from mlx_retrieval.training.chat.run import prepare
    from mlx_retrieval.training.config import for_task

    backend.prepare()  # as commands do
    given = {"model": f"{folder}/{bits}", "data": [f"{folder}/data"], "batch_size": batch, "max_length": length}
    given |= {"num_layers": num_layers, "grad_checkpoint": grad_checkpoint, "dry_run": True}
    run = prepare(for_task("chat", given))
    seconds, counts = run.trainer.measure_step()
    return {
        "peak": backend.peak_memory(),
        "estimate": run.outlook.expected.total,
        "weights": run.outlook.expected.weights,
        "tokens_per_second": counts.tokens / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a chat model; smollm2: where tools/fetch_smollm2.py puts it")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=32_000, help="numbers beyond the tokenizer's are never met")
    parser.add_argument("--length", type=int, default=256, help="tokens of every conversation")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--bits", type=int, nargs="+", default=[0, 4], help="0 = float32")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kind = f"Llama, {args.layers} layers x {args.hidden}, feed-forward {3 * args.hidden}"
        kind += f", vocabulary {args.vocabulary:,}"
        source = smollm2() if args.model == "smollm2" else args.model
        for bits in args.bits:
            if source:
                kind = args.model
                in_child(converted, source, folder / str(bits), bits)
            else:
                in_child(random_llama, folder / str(bits), args.hidden, args.layers, args.vocabulary, bits)
        conversations(folder / "data", args.length)
        print(f"{kind}; conversations of {args.length} tokens\n")
        print("| weights | layers trained | checkpointed | batch | peak MB | estimated MB | tokens/s |")
        print("|---|---|---|---|---|---|---|")
        for bits, layers, checkpointed, batch in itertools.product(args.bits, (1, -1), (False, True), args.batch_sizes):
            found = in_child(measure, str(folder), bits, layers, checkpointed, batch, args.length)
            print(
                f"| {f'{bits}-bit' if bits else 'float32'} | {'all' if layers == -1 else layers} | "
                f"{'yes' if checkpointed else 'no'} | {batch} | {found['peak'] / 1e6:,.0f} | "
                f"{found['estimate'] / 1e6:,.0f} | {found['tokens_per_second']:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
