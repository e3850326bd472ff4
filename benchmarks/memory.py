"""Estimated and measured memory of training, setting by setting; and --micro-batch-tokens auto under limits.

    python benchmarks/memory.py                               the table of benchmarks/README.md, half an hour
    python benchmarks/memory.py --paths plain --only t5       some of it
    python benchmarks/memory.py --limits 2 4 8                runs with auto that may have so many GB
    python benchmarks/memory.py --model FOLDER --data FILE --flags "--batch-size 256" --steps 6         one's own run

all-MiniLM-L6-v2 and random weights of small, real shapes; a few steps each, in a process of its own. Paths: "compiled"
is a CPU's, "plain" that of GPUs in float32 (MLX_RETRIEVAL_PLAIN=1), "mac" the same in the checkpoint's dtype, with the
budget and lengths of a Mac, computed on the CPU. Limits are those of Linux control groups (version 1, as root): the
kernel kills a process that takes more.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sides import ROOT, minilm

ENCODER = {"num_attention_heads": 6, "num_hidden_layers": 6, "vocab_size": 30_522}
BERT = {"hidden_size": 384, "intermediate_size": 1536, "max_position_embeddings": 1024}
MODERNBERT = {"hidden_size": 384, "intermediate_size": 576, "max_position_embeddings": 8192}
DECODER = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 2}
DECODER |= {"head_dim": 64, "num_hidden_layers": 6, "vocab_size": 32_000, "max_position_embeddings": 4096}
DECODER |= {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True}
T5 = {"d_model": 384, "d_kv": 64, "num_heads": 6, "num_layers": 6, "vocab_size": 30_522, "d_ff": 1024}
PATHS = ("compiled", "plain", "mac")
MAC = {"AS_METAL": True, "IS_GPU": True, "IS_METAL": True, "MICRO_BATCH_TOKENS": 16_384, "MICRO_BATCH_OVERHEAD": 512}
MAC |= {"LENGTH_GRID": 16}
CONFIGS = {
    "bert": {"model_type": "bert"} | BERT | ENCODER,
    "modernbert": {"model_type": "modernbert"} | MODERNBERT | ENCODER,
    "qwen3": {"model_type": "qwen3"} | DECODER,
    "llama": {"model_type": "llama"} | DECODER,
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 6} | DECODER,
    "t5": {"model_type": "t5"} | T5,
    "mt5": {"model_type": "mt5", "feed_forward_proj": "gated-gelu"} | T5,
}
HALF = ("qwen3", "llama", "gemma3")  # in bfloat16, as such models are on the hub
SETTINGS = {  # flags of train.py; words of a document
    "MiniLM": ("minilm --batch-size 16", 60),
    "MiniLM, long": ("minilm --batch-size 4 --max-length 512", 600),
    "MiniLM, full": ("minilm --batch-size 16 --train-type full", 60),
    "MiniLM, late": ("minilm --batch-size 8 --task late", 150),
    "MiniLM, rerank": ("minilm --batch-size 8 --task rerank --random-negatives 3", 60),
    "BERT, DoRA": ("bert --batch-size 16 --train-type dora", 60),
    "ModernBERT, long": ("modernbert --batch-size 2 --max-length 1024", 1200),
    "ModernBERT, checkpointed": ("modernbert --batch-size 16 --grad-checkpoint", 100),
    "Qwen3": ("qwen3 --batch-size 8", 100),
    "Qwen3, full": ("qwen3 --batch-size 8 --train-type full", 100),
    "Gemma 3, checkpointed": ("gemma3 --batch-size 8 --grad-checkpoint --max-length 512", 300),
    "Llama, last 2 blocks": ("llama --batch-size 8 --num-layers 2", 100),
    "T5": ("t5 --batch-size 8", 150),
    "mT5, full": ("mt5 --batch-size 8 --train-type full", 100),
    "chat, Llama": ("llama --task chat --batch-size 2 --max-length 256", 600),
    "chat, checkpointed": ("llama --task chat --batch-size 2 --max-length 512 --grad-checkpoint", 600),
}


def random_model(name: str, folder: Path) -> None:
    """Write a model of one of CONFIGS with random weights, and a tokenizer of ids within its vocabulary."""
    from mlx_retrieval.backend import mx

    from mlx.utils import tree_flatten

    from mlx_retrieval.backbones import ENCODERS, bert, decoder, modernbert, t5

    config = CONFIGS[name]
    kind = config["model_type"]
    if kind in ENCODERS:
        model = {bert: bert.Bert, modernbert: modernbert.ModernBert, t5: t5.T5}[ENCODERS[kind]](config)
        source = Path(minilm())
    else:
        built, arguments = decoder._classes(config)
        model = built(arguments.from_dict(config))
        source = ROOT / "gemma-3-tiny-mlx"
    folder.mkdir()
    for file in source.glob("*token*.json"):
        shutil.copy(file, folder)
    dtype = mx.bfloat16 if name in HALF else mx.float32
    weights = {n: v.astype(dtype) for n, v in tree_flatten(model.parameters()) if n != "lm_head.weight"}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def rows(file: Path, words: int, chat: bool) -> None:
    """Write rows whose documents have about so many words, half of them half as long, from the toolkit's texts."""
    read = [json.loads(line) for line in (ROOT / "train-data.jsonl").read_text(encoding="utf-8").splitlines()]
    text = " ".join(row["document"] for row in read[:1000]).split()
    with open(file, "w", encoding="utf-8") as lines:
        for i, row in enumerate(read[:200]):
            count = words if i % 2 else words // 2
            document = " ".join(text[(37 * i) % 5000 :][:count])
            turns = [{"role": "user", "content": row["query"]}, {"role": "assistant", "content": document}]
            found = {"messages": turns} if chat else {"query": f"{row['query']} {i}", "document": document}
            lines.write(json.dumps(found) + "\n")


def measure(path: str, arguments: list[str]) -> dict:
    """In a process of its own: take the steps of a run, and return what they took and what was estimated, in bytes."""
    from mlx_retrieval.backend import mx

    from mlx_retrieval import backend
    from mlx_retrieval.training import run
    from mlx_retrieval.training.flags import from_flags

    backend.prepare()
    if path == "mac":  # without the products of as_metal.py, whose float32 copies a Mac does not make
        for name, value in MAC.items():
            setattr(backend, name, value)
        os.environ["MLX_RETRIEVAL_MEMORY"] = "64"
    settings, _ = from_flags("", "", arguments)
    job = run.prepare(settings)
    if settings.micro_batch_tokens == "auto":
        run.run(job)
        return {"budget": job.trainer.grad_cache.budget, "resident": _most_resident()}
    if settings.task == "chat":
        job.trainer.measure_step()
    else:
        job.trainer.update(job.trainer.batches.batch(0), 1)
        mx.reset_peak_memory()  # the first step also reads the weights, and compiles
        for k in range(settings.steps - 1):  # the first ones, which the estimate is of
            job.trainer.update(job.trainer.batches.batch(k), k + 2)
    expected = job.outlook.expected
    return {
        "peak": backend.peak_memory(),
        "estimate": expected.total,
        "resident": _most_resident(),
        "of_process": expected.of_process,
    }


def _most_resident() -> int:
    """Return the most bytes that this process has had in memory, libraries included."""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


@contextmanager
def limited(limit: int) -> Iterator[Path]:
    """Make a control group of `limit` bytes below this process's own, and remove it in the end."""
    (own,) = (
        line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line
    )
    group = Path("/sys/fs/cgroup/memory", own.lstrip("/"), f"mlx-retrieval-{os.getpid()}")
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def in_process(path: str, arguments: list[str], group: Path | None = None) -> dict | None:
    """Return `measure` of a fresh process, in a control group if one is given; None if it was killed."""
    plain = {"MLX_RETRIEVAL_PLAIN": "0" if path == "compiled" else "1"}
    command = [sys.executable, __file__, "--measure", path, *arguments]
    if group:
        command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
    done = subprocess.run(command, env=os.environ | plain, capture_output=True, text=True, check=False)
    if done.returncode in (137, -9):
        return None
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def prepared(name: str, folder: Path) -> list[str]:
    """Make the model and rows of a setting, and return its flags."""
    flags, words = SETTINGS[name]
    model, *flags = flags.split()
    if model == "minilm":
        base = minilm()
    elif not (base := folder / model).is_dir():
        subprocess.run([sys.executable, __file__, "--make", model, str(base)], check=True)
    chat = "chat" in flags
    data = folder / f"{words}{chat}.jsonl"
    if not data.is_file():
        rows(data, words, chat)
    rest = [] if chat else ["--eval-tasks"]
    return ["--model", str(base), "--data", str(data), "--steps", "3", "--save-steps", "0", *flags, *rest]


def row(name: str, path: str, found: dict) -> str:
    """Return a row of the table. As a Mac it has no process: a CPU's half precision takes memory of its own."""
    pairs = [("peak", "estimate"), ("resident", "of_process")][: 1 if path == "mac" else 2]
    cells = [f"{found[a] / 1e6:,.0f} | {found[b] / 1e6:,.0f} | {found[b] / found[a] - 1:+.0%}" for a, b in pairs]
    return f"| {name} | {path} | {' | '.join([*cells, *['| | '] * (2 - len(cells))])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--paths", nargs="+", default=["compiled", "plain", "mac"], choices=["compiled", "plain", "mac"]
    )
    parser.add_argument("--only", default="", help="settings whose name has this in it")
    parser.add_argument("--limits", type=float, nargs="+", default=[], help="GB of the control group of runs with auto")
    parser.add_argument("--model", help="measure a run of this model on --data, instead of the settings of the table")
    parser.add_argument("--data", help="with --model: rows")
    parser.add_argument("--flags", default="", help="with --model: further flags of train.py")
    parser.add_argument("--steps", type=int, default=6, help="with --model: the first batch twice, then the next ones")
    args = parser.parse_args()
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data belong together")
    names = [name for name in SETTINGS if args.only.lower() in name.lower()]
    with tempfile.TemporaryDirectory() as folder:
        output = ["--output", f"{folder}/run", "--overwrite"]
        if args.model:
            rest = shlex.split(f"--eval-tasks --save-steps 0 --steps {args.steps} {args.flags}")
            given = ["--model", args.model, "--data", args.data, *rest, *output]
            print(row("one's own", "compiled", in_process("compiled", given)))
            return
        if args.limits:
            print("| setting | path | limit GB | tokens at once | resident MB |\n|---|---|---|---|---|")
        else:
            print("| setting | path | peak MB | estimated | | resident MB | estimated | |")
            print("|---|---|---|---|---|---|---|---|")
        for name in names:
            flags = prepared(name, Path(folder))
            for path in args.paths:
                if args.limits and "chat" in flags:
                    continue
                for limit in args.limits:
                    with limited(int(limit * 1e9)) as group:
                        found = in_process(path, [*flags, *output, "--micro-batch-tokens", "auto"], group)
                    result = f"{found['budget']:,} | {found['resident'] / 1e6:,.0f}" if found else "**killed** | "
                    print(f"| {name} | {path} | {limit:g} | {result} |", flush=True)
                if not args.limits:
                    print(row(name, path, in_process(path, [*flags, *output])), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3:])))
    elif sys.argv[1:2] == ["--make"]:
        random_model(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
