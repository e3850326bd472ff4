"""Train, export and evaluate the exported folder with both libraries: all-MiniLM-L6-v2 on MedQuAD.

    pip install -r benchmarks/requirements.txt
    python benchmarks/export_medquad.py --data ../shared/data/medquad --steps 25

Trains LoRA for some minutes, exports to sentence-transformers' layout and to mlx in 8 and 4 bits, and evaluates on the
test folder: the base, the adapter, the exported folder in this toolkit and in sentence-transformers, and
the exported model's vectors stored as int8 and binary. The quantised folders are evaluated on a part of the test
folder, since mlx computes with quantised weights some twenty times slower on CPUs. Figures in benchmarks/README.md.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers import Peer
from sides import minilm, write_part

import export
import train
from mlx_retrieval import backend
from mlx_retrieval.evaluation.results import Evaluation, VectorFormat, compare
from mlx_retrieval.evaluation.retrieval import evaluate, evaluate_formats
from mlx_retrieval.exporters import job
from mlx_retrieval.inference.embedder import load
from mlx_retrieval.training import config
from mlx_retrieval.utils.console import print_rows

backend.prepare()  # as commands do


def show(title: str, results: dict[str, Evaluation]) -> None:
    """Print nDCG@10 of each, and the interval of its difference from the adapter's."""
    rows = []
    for name, result in results.items():
        _, _, score, difference, low, high = compare(results["adapter"], result)[0]
        rows.append((name, f"{score:.4f}", f"{difference:+.4f}", f"[{low:+.4f}, {high:+.4f}]"))
    print_rows(title, ("what", "nDCG@10", "to the adapter", "95 % interval"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl and test/")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--adapter", help="measure this adapter of an earlier run, and train none")
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
    if not args.adapter:
        train.train(settings)
    adapter = args.adapter or str(work / "run" / "final")
    whole = export.export(job.Export(output=str(work / "minilm-medquad"), adapter=adapter))
    quantised = [
        export.export(job.Export(output=str(work / f"{bits}-bit"), adapter=adapter, format="mlx", quantize=bits))
        for bits in (8, 4)
    ]
    ours, stored = evaluate_formats(load(whole), [test], [VectorFormat("int8", 384), VectorFormat("binary", 384)])
    theirs = Peer(sentence_transformers.SentenceTransformer(str(whole), device="cpu"))
    results = {
        "base": evaluate(load(minilm()), [test]),
        "adapter": evaluate(load(adapter), [test]),
        "exported, embed.load": ours,
        "exported, SentenceTransformer": evaluate(theirs, [test]),
        **{f"exported, vectors as {precision}": result for (precision, *_), result in stored.items()},
    }
    show("MedQuAD test, 300 queries", results)
    part = str(write_part(Path(test), work / "part", queries=30, documents=80))
    results = {"adapter": evaluate(load(adapter), [part])}
    results |= {f"exported mlx, {path.name}": evaluate(load(path), [part]) for path in quantised}
    show("a part of it: 30 queries", results)
    versions = f"sentence-transformers {sentence_transformers.__version__}"
    print(f"{backend.describe()}; {versions}; {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
