"""A real decoder as an embedding model, beside sentence-transformers: SmolLM2-135M-Instruct with LoRA on MedQuAD.

    pip install -r benchmarks/requirements.txt && python tools/fetch_smollm2.py
    python benchmarks/decoder_medquad.py --data ../shared/data/medquad --keep runs       # some 40 minutes on 2 cores

Attention to earlier tokens or to all, and the mean of the tokens or the last one: each before and after the same steps.
sentence-transformers takes the causal two, from the same weights, with the same LoRA, batches, learning rates, clipping
and temperature; it caches gradients above 32 rows. Each run is a process of its own. All are evaluated by eval.py on a
part of the test folder; so is the exported folder of the best adapter, by both libraries. Prints nDCG@10, the interval
of each difference to the peer, wall times and their ratio, and how close the vectors are; ends with an error where
those of the exported folder differ. Figures in benchmarks/README.md.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peers
import sides
from medquad import COMPARED, Outcome, evaluated, ndcg, our_side, peer_side, settings_of, steps_of

LEAST_COSINE = 0.9999  # of what both libraries compute from the exported folder
VARIANTS = [(bidirectional, pooling) for bidirectional in (False, True) for pooling in ("mean", "last")]


def name_of(bidirectional: bool, pooling: str) -> str:
    return f"{'bidirectional' if bidirectional else 'causal'}, {'last token' if pooling == 'last' else pooling}"


def run_of(args: argparse.Namespace, name: str, settings: dict[str, Any], function: Any, *rest) -> Outcome:
    """Return the outcome of one side's run, computed in a process of its own, or kept from an earlier call."""
    from seeds import kept

    def compute() -> dict[str, Any]:
        outcome = sides.in_child(function, settings, *rest)
        return outcome._asdict() | {"vectors": outcome.vectors.tolist()}

    fixed = {key: value for key, value in settings.items() if key != "output"}
    outcome = Outcome(**kept(args.keep, name, repr((fixed, args.queries, args.documents)), compute))
    print(f"{name}: nDCG@10 {ndcg(outcome.before):.4f}, then {ndcg(outcome.after):.4f}", flush=True)
    return outcome._replace(vectors=np.array(outcome.vectors))


def figures(outcome: Outcome) -> tuple[str, str]:
    return f"{ndcg(outcome.before):.4f}", f"{ndcg(outcome.after):.4f}"


def least_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the least cosine of vectors to their counterparts; all (N, D), of length 1."""
    return float((ours * theirs).sum(axis=1).min())


def exported(adapter: str, folder: str, test: str) -> tuple[list[tuple[str, Any]], float]:
    """Export an adapter, which checks the folder, and evaluate that folder with both libraries.

    Returns the evaluation of each by name, and the least cosine between the vectors of both.
    """
    from mlx_retrieval import backend

    backend.prepare()

    from mlx_retrieval.exporters.job import Export
    from mlx_retrieval.exporters.run import export
    from mlx_retrieval.inference.embedder import load

    export(Export(adapter=adapter, output=folder))
    vectors, ours, _ = evaluated(load(folder), test)
    peer_vectors, theirs, _ = evaluated(peers.Peer(peers.sentence_transformer(folder)), test)
    found = [("exported, embed.load", ours), ("exported, SentenceTransformer", theirs)]
    return found, least_cosine(vectors, peer_vectors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl and test/")
    parser.add_argument("--model", help="folder of a decoder (default: SmolLM2 where tools/fetch_smollm2.py puts it)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16, help="rows that one loss sees")
    parser.add_argument("--max-length", type=int, default=96, help="most tokens of a query and of a document")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--queries", type=int, default=150, help="evaluate with this many of the test folder")
    parser.add_argument("--documents", type=int, default=400, help="search among this many: all answers, and others")
    parser.add_argument("--keep", metavar="FOLDER", help="keep finished runs here, and repeat none that is there")
    args = parser.parse_args()

    from mlx_retrieval.evaluation.results import compare
    from mlx_retrieval.utils.console import print_rows

    model, machine = peers.model_folder(args.model or sides.smollm2()), sides.machine()
    print(machine, flush=True)
    with tempfile.TemporaryDirectory() as work:
        test = str(sides.write_part(Path(args.data) / "test", Path(work) / "test", args.queries, args.documents))
        keep = Path(args.keep or work)
        common = settings_of(args, model) | {"max_length": args.max_length, "overwrite": True}
        steps = sides.in_child(steps_of, common | {"output": f"{work}/none"})
        ours, theirs = {}, {}
        for bidirectional, pooling in VARIANTS:
            name = name_of(bidirectional, pooling)
            settings = common | {"pooling": pooling, "bidirectional": bidirectional}
            settings["output"] = str(keep / name.replace(", ", "-").replace(" ", "-"))
            ours[name] = run_of(args, f"ours, {name}", settings, our_side, test)
            if not bidirectional:
                theirs[name] = run_of(args, f"peer, {name}", settings, peer_side, steps, test)
        best = max(ours, key=lambda name: ndcg(ours[name].after))
        adapter = str(keep / best.replace(", ", "-").replace(" ", "-") / "final")
        folders, agreement = sides.in_child(exported, adapter, f"{work}/exported", test)

    rows = []
    for name, our in ours.items():
        peer = theirs.get(name)
        change = ("", "")
        if peer:
            _, _, _, difference, low, high = compare(peer.after, our.after)[0]
            change = (f"{difference:+.4f}", f"[{low:+.4f}, {high:+.4f}]")
        rows.append((f"ours, {name}", *figures(our), *change, f"{our.training:.0f}"))
        if peer:
            rows.append((f"peer, {name}", *figures(peer), "", "", f"{peer.training:.0f}"))
    rows += [(f"{reader} ({best})", "", f"{ndcg(found):.4f}", "", "", "") for reader, found in folders]
    title = f"MedQuAD test, {args.queries} queries among {args.documents} documents"
    columns = ("what", "before", "after", "to the peer", "95 % interval", "training s")
    print_rows(f"{title}; {args.steps} steps of {args.batch_size}", columns, rows)
    for name, peer in theirs.items():
        cosine = least_cosine(ours[name].vectors, peer.vectors)
        print(f"{name}: cosine of {COMPARED} untrained vectors to the peer's: at least {cosine:.6f}")
        print(f"{name}: {peer.training / ours[name].training:.2f} times as fast as the peer")
    print(f"exported: cosine of {COMPARED} vectors in both libraries: at least {agreement:.6f}")
    if not agreement >= LEAST_COSINE:  # nan, too
        sys.exit("sentence-transformers computes other vectors from the exported folder")


if __name__ == "__main__":
    main()
