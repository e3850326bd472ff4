"""Train, export, and let both libraries judge what was exported: all-MiniLM-L6-v2 on MedQuAD.

    pip install -r benchmarks/requirements.txt
    python benchmarks/export_medquad.py --data ../shared/data/medquad --steps 25

Trains LoRA for some minutes, exports to sentence-transformers' layout and to mlx in 8 and 4 bits, and evaluates on the
test folder: the base, the adapter, the exported folders as the toolkit reads them, the same folder as
sentence-transformers reads it, and the exported model's vectors stored as int8 and binary. Figures in
benchmarks/README.md.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import backend

from medquad import Peer
from sides import minilm

import config
import export
import train
from embed import load
from eval import compare, evaluate, evaluate_stored
from reporting import print_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl and test/")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()

    import sentence_transformers

    began = time.perf_counter()
    work, test = Path(tempfile.mkdtemp()), str(Path(args.data) / "test")
    settings = config.Settings(
        model=minilm(),
        data=[str(Path(args.data) / "train.jsonl")],
        batch_size=args.batch_size,
        steps=args.steps,
        learning_rate=2e-4,
        eval_tasks=[],
        save_steps=0,
        output=str(work / "run"),
    )
    train.train(settings)
    adapter = str(work / "run" / "final")
    whole = export.export(export.Export(output=str(work / "minilm-medquad"), adapter=adapter))
    quantised = [
        export.export(export.Export(output=str(work / f"{bits}-bit"), adapter=adapter, format="mlx", quantize=bits))
        for bits in (8, 4)
    ]
    ours, stored = evaluate_stored(load(whole), [test], [("int8", 384), ("binary", 384)])
    theirs = Peer(sentence_transformers.SentenceTransformer(str(whole), device="cpu"))
    results = {
        "base": evaluate(load(minilm()), [test]),
        "adapter": evaluate(load(adapter), [test]),
        "exported, embed.load": ours,
        "exported, SentenceTransformer": evaluate(theirs, [test]),
        **{f"exported mlx, {path.name}": evaluate(load(path), [test]) for path in quantised},
        **{f"exported, vectors as {precision}": result for (precision, _), result in stored.items()},
    }
    rows = []
    for name, result in results.items():
        _, _, score, difference, low, high = compare(results["adapter"], result)[0]
        rows.append((name, f"{score:.4f}", f"{difference:+.4f}", f"[{low:+.4f}, {high:+.4f}]"))
    print_rows("MedQuAD test, 300 queries", ("what", "nDCG@10", "to the adapter", "95 % interval"), rows)
    versions = f"sentence-transformers {sentence_transformers.__version__}"
    print(f"{backend.describe()}; {versions}; {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
