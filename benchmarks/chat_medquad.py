"""Chat fine-tuning on real conversations, against mlx-lm's own `lora` command: questions and answers of MedQuAD.

    python benchmarks/chat_medquad.py --data ../shared/data/medquad                   the embedded tiny model
    python benchmarks/chat_medquad.py --data ../shared/data/medquad --random-llama --steps 20
    python benchmarks/chat_medquad.py --data ../shared/data/medquad --model smollm2 --steps 40 --learning-rate 2e-4 \
        --max-length 192 --answers 3

Both sides start from the same weights and LoRA matrices and take the same steps on the same batches, which are those
that mlx-lm makes (rows in the file's order, its own shuffle of batches), with AdamW at a constant rate; both have this
toolkit's BLAS. The validation loss of both adapters is measured by the same function. `--answers` prints what mlx-lm's
model answers to held-out questions before training, with the adapter, and from the exported folder. Figures in
benchmarks/README.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import yaml
from chat_memory import random_llama
from sides import ROOT, in_child, smollm2

from mlx_retrieval import backend
from mlx_retrieval.backbones.hub import read_safetensors
from mlx_retrieval.exporters.job import Export
from mlx_retrieval.exporters.run import export
from mlx_retrieval.models import loading
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.chat.run import prepare
from mlx_retrieval.training.config import Settings, for_task
from mlx_retrieval.utils.console import print_lines, print_rows

backend.prepare()  # as commands do

VALID = 64
LONGEST = 80  # tokens of a printed answer
# mlx-lm's command, in a process that has loaded the toolkit's BLAS first.
COMMAND = (
    "import sys; from mlx_retrieval import backend; backend.prepare(); "
    "from mlx_lm.lora import main; sys.argv[0] = 'mlx_lm.lora'; main()"
)


def write_conversations(source: Path, folder: Path, count: int) -> None:
    """Write `count` question-answer pairs as train.jsonl and others as valid.jsonl, drawn at random."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    chosen = np.random.default_rng(0).permutation(len(rows))[: count + VALID]
    folder.mkdir(parents=True)
    for name, part in (("train", chosen[VALID:]), ("valid", chosen[:VALID])):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for row in (rows[i] for i in part):
                pair = (("user", row["query"]), ("assistant", row["document"]))
                messages = [{"role": role, "content": text} for role, text in pair]
                file.write(json.dumps({"messages": messages}) + "\n")


def ours(given: dict, seed: int) -> tuple[dict, float, float]:
    """Train with this toolkit on mlx-lm's batches; return (results, wall seconds, seconds in steps)."""
    began = time.perf_counter()
    run = prepare(for_task("chat", given))
    size = run.settings.batch_size
    if run.trainer.batches.rows.empty:
        sys.exit("--max-length leaves nothing of some answers, and mlx-lm's loss would be no number there")
    order = np.random.RandomState(seed).permutation(len(run.trainer.batches.rows) // size)
    run.trainer.batches.numbers = lambda k: np.arange(order[k] * size, (order[k] + 1) * size)
    results = training_run.run(run)
    return results, time.perf_counter() - began, run.trainer.state.seconds


def theirs(settings: Settings, folder: Path) -> float:
    """Run mlx-lm's command with the same settings, which writes its adapter into `folder`; return the wall seconds."""
    final = Path(settings.output) / "final"
    adapted = json.loads((final / loading.ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config = {
        "model": settings.model,
        "train": True,
        "data": settings.data[0],
        "fine_tune_type": settings.train_type,
        "optimizer": "adamw",
        "optimizer_config": {"adamw": {"weight_decay": 0.0, "bias_correction": True}},
        "lora_parameters": adapted["lora_parameters"],
        "num_layers": settings.num_layers,
        "batch_size": settings.batch_size,
        "iters": settings.steps,
        "learning_rate": settings.learning_rate,
        "steps_per_eval": settings.steps,
        "val_batches": settings.val_batches,
        "steps_per_report": settings.steps_per_report,
        "save_every": settings.steps,
        "max_seq_length": settings.max_length,
        "mask_prompt": settings.mask_prompt,
        "seed": settings.seed,
        "adapter_path": str(folder),
    }
    file = folder.parent / "mlx-lm.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "--config", str(file)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"mlx_lm.lora: {done.stderr}")
    return time.perf_counter() - began


def validation_loss(given: dict, adapter: Path) -> float:
    """Return the loss of an adapter on all validation conversations."""
    run = prepare(for_task("chat", given | {"val_batches": -1}))
    loading.load_trainable(run.trainer.model, read_safetensors(adapter / loading.ADAPTERS), adapter)
    return run.trainer.evaluate(0)["validation_loss"]


def answers(folder: Path, adapter: Path | None, questions: list[str], longest: int) -> list[str]:
    """Return the greedy answers of mlx-lm's model to `questions`, `longest` tokens at most each."""
    from mlx_lm import generate, load

    model, tokenizer = load(str(folder), adapter_path=adapter and str(adapter))
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    return [generate(model, tokenizer, prompt=prompt, max_tokens=longest) for prompt in prompts]


def show_answers(model: Path, folder: Path, count: int) -> bool:
    """Print the answers of before and after to held-out questions; return whether the exported folder's are the same.

    Greedy answers: after a tie, rounding alone would make others of them.
    """
    adapter, exported = folder / "ours" / "final", folder / "exported"
    export(Export(adapter=str(adapter), output=str(exported)))
    lines = (folder / "data" / "valid.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    questions = [json.loads(line)["messages"][0]["content"] for line in lines]
    models = (model, None), (model, adapter), (exported, None)
    before, after, merged = (answers(*each, questions, LONGEST) for each in models)
    for number, question in enumerate(questions):
        print(f"\nquestion: {question}\n\nbefore: {before[number]}\n\nafter: {after[number]}")
    same = sum(map(str.__eq__, after, merged))
    print(f"\nthe exported folder gives {same} of {len(questions)} answers word for word in mlx_lm")
    return same == len(questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--random-llama", action="store_true", help="4 layers x 256, random weights, in 4 bits")
    which.add_argument("--model", help="folder of a chat model; smollm2: where tools/fetch_smollm2.py puts it")
    parser.add_argument("--answers", type=int, default=0, metavar="N", help="print answers to N held-out questions")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_conversations(Path(args.data) / "train.jsonl", folder / "data", args.steps * args.batch_size)
        model = ROOT / "gemma-3-tiny-mlx"
        if args.random_llama:
            model = folder / "llama"
            in_child(random_llama, model, 256, 4, 3072, 4)
        if args.model:
            model = Path(smollm2() if args.model == "smollm2" else args.model)
        given = {"model": str(model), "data": [str(folder / "data")], "output": str(folder / "ours")}
        given |= {"batch_size": args.batch_size, "steps": args.steps, "max_length": args.max_length}
        given |= {"learning_rate": args.learning_rate, "schedule": "constant", "warmup": 0.0, "max_grad_norm": 0.0}
        given |= {"mask_prompt": True, "num_layers": -1, "val_batches": -1, "eval_steps": 0, "save_steps": 0}
        # Kernels are compiled once on a machine.
        warm = given | {"steps": 2, "val_batches": 1, "output": str(folder / "warm")}
        ours(warm, seed=0)
        theirs(Settings(**warm | {"task": "chat"}), folder / "their-warm")
        results, wall, steps = ours(given, seed=0)
        peer_wall = theirs(Settings(**given | {"task": "chat"}), folder / "theirs")
        adapters = {"ours": folder / "ours" / "final", "peer": folder / "theirs"}
        found = {side: validation_loss(given, adapter) for side, adapter in adapters.items()}
        before = results["before"]["validation_loss"]
        settings = f"{model.name}, {args.steps} steps of {args.batch_size}, {args.max_length} tokens at most"
        print_lines([("machine", backend.describe()), ("settings", settings)])
        print_rows(
            "validation loss",
            ["", "before", "after", "wall s", "of it steps s"],
            [
                ["train.py", f"{before:.4f}", f"{found['ours']:.4f}", f"{wall:.1f}", f"{steps:.1f}"],
                ["mlx_lm.lora", f"{before:.4f}", f"{found['peer']:.4f}", f"{peer_wall:.1f}", ""],
            ],
        )
        print(f"mlx_lm.lora takes {peer_wall / wall:.2f} times as long")
        agree = not args.answers or show_answers(model, folder, args.answers)
        ratio = abs(found["ours"] / found["peer"] - 1)
        print(f"difference {ratio:.3%}, fall {before - found['ours']:.4f}")
        if ratio > 0.01 or found["ours"] >= before:
            sys.exit("more than 1 % apart, or no fall")
        if not agree:
            sys.exit("the exported folder answers otherwise than the adapter")


if __name__ == "__main__":
    main()
