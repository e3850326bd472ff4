"""Real weights, real data, against sentence-transformers: all-MiniLM-L6-v2 with LoRA on MedQuAD.

    pip install -r benchmarks/requirements.txt
    python benchmarks/medquad.py --data ../shared/data/medquad --steps 60

Both sides start from the same weights and take the same steps on the same batches with the same LoRA targets, learning
rate, schedule, clipping and temperature, each in a process of its own, one after the other; the peer trains with
CachedMultipleNegativesRankingLoss. Both are evaluated by eval.py on the test folder. Prints how close the vectors are,
nDCG@10 of both before and after, and wall times. Figures in benchmarks/README.md.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peers
import sides

COMPARED = 300  # documents whose vectors are compared
MINI_BATCH = 32  # rows that the peer computes at once
MODEL = ("pooling", "bidirectional", "max_length")  # settings that decide an untrained model's vectors


class Outcome(NamedTuple):
    """The results of one side."""

    vectors: np.ndarray  # of the first documents, before training
    before: Any  # evaluation
    after: Any
    training: float  # wall seconds
    evaluation: float


def evaluated(model: Any, test: str) -> tuple[np.ndarray, Any, float]:
    """Return vectors of the first documents, the evaluation, and the wall seconds that the evaluation took."""
    from mlx_retrieval.dataset.text_files import read_texts
    from mlx_retrieval.evaluation.retrieval import evaluate

    vectors = model.encode(list(read_texts(Path(test) / "corpus.jsonl"))[:COMPARED], prompt="document")
    began = time.perf_counter()
    found = evaluate(model, [test])
    return vectors, found, time.perf_counter() - began


def ndcg(evaluation: Any) -> float:
    return evaluation.average()["ndcg_at_10"]


def our_side(settings: dict[str, Any], test: str) -> Outcome:
    import train
    from mlx_retrieval import backend
    from mlx_retrieval.inference.embedder import load
    from mlx_retrieval.training import config

    backend.prepare()  # as commands do
    base = load(settings["model"], **{name: settings[name] for name in MODEL if name in settings})
    vectors, before, evaluation = evaluated(base, test)
    began = time.perf_counter()
    train.train(config.Settings(**settings))
    training = time.perf_counter() - began
    return Outcome(vectors, before, evaluated(load(f"{settings['output']}/final"), test)[1], training, evaluation)


def settings_of(args: Any, model: str) -> dict[str, Any]:
    """Return the settings that both sides train by, but for the output: `args` has data, batch_size, steps and rate."""
    return {
        "model": model,
        "data": [str(Path(args.data) / "train.jsonl")],
        "batch_size": args.batch_size,
        "steps": args.steps,
        "learning_rate": args.learning_rate,
        "temperature": 0.05,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "eval_tasks": [],
        "save_steps": 0,
    }


def steps_of(settings: dict[str, Any]) -> list[tuple[float, list[str], list[str]]]:
    """Return (learning rate, queries, positives) of every step that the toolkit takes."""
    from mlx_retrieval.training import config, run
    from mlx_retrieval.training.trainer import learning_rate

    asked = config.Settings(**settings, dry_run=True)
    batches, steps = run.prepare(asked).trainer.batches, []
    for k in range(asked.steps):
        examples = [batches.rows[i] for i in batches.row_numbers(k)]
        texts = [example.query for example in examples], [example.positive for example in examples]
        steps.append((learning_rate(asked, k + 1), *texts))
    return steps


def peer_side(settings: dict[str, Any], steps: list, test: str) -> Outcome:
    """Train the peer. This process imports the toolkit only after training."""
    import torch
    from sentence_transformers.sentence_transformer import losses

    def base():
        pooling = settings.get("pooling")
        return peers.sentence_transformer(settings["model"], settings.get("max_length"), pooling=pooling)

    model = base()
    peers.add_lora(model, settings["lora_rank"], settings["lora_alpha"])
    scale = 1 / settings["temperature"]
    if settings["batch_size"] > MINI_BATCH:
        loss_of = losses.CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=MINI_BATCH)
    else:  # which caching would compute twice for nothing
        loss_of = losses.MultipleNegativesRankingLoss(model, scale=scale)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings["weight_decay"])
    # Stays in evaluation mode: the toolkit has no dropout by default, and a step with the model's own takes longer.
    began = time.perf_counter()
    for step, (rate, *texts) in enumerate(steps, start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = loss_of([model.preprocess(side) for side in texts], torch.zeros(len(texts[0])))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])
        optimizer.step()
        if step % 10 == 0 or step == 1:
            print(f"peer step {step}: loss {loss.item():.4f}, {time.perf_counter() - began:.0f} s", flush=True)
    training = time.perf_counter() - began
    vectors, before, evaluation = evaluated(peers.Peer(base()), test)
    return Outcome(vectors, before, evaluated(peers.Peer(model.eval()), test)[1], training, evaluation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl and test/")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    args = parser.parse_args()

    test = str(Path(args.data) / "test")
    print(sides.machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(args, sides.minilm()) | {"output": f"{folder}/run"}
        steps = sides.in_child(steps_of, settings)
        ours = sides.in_child(our_side, settings, test)
        theirs = sides.in_child(peer_side, settings, steps, test)

    cosine = (ours.vectors * theirs.vectors).sum(axis=1).min()
    print(f"\ncosine of {COMPARED} vectors to sentence-transformers': at least {cosine:.7f}")
    print(f"{'':8}{'before':>10}{'after':>10}{'training s':>12}{'evaluation s':>14}")
    for name, side in (("ours", ours), ("peer", theirs)):
        print(
            f"{name:8}{ndcg(side.before):>10.4f}{ndcg(side.after):>10.4f}{side.training:>12.0f}{side.evaluation:>14.0f}"
        )


if __name__ == "__main__":
    main()
