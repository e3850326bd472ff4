"""Hold out scored pairs from training rows, to judge a model by: neither of their texts is trained on.

held = hold_out(open_source(["pairs.jsonl"]), share=0.05, seed=0)
held.rows                                   # a `sources.Source` without them
held.questions.write(Path("run/held-out"))  # as pairs.jsonl
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_retrieval.dataset.choice import FEWEST, groups_of, wanted
from mlx_retrieval.dataset.held_out import HeldOut, Leaving, Scan
from mlx_retrieval.dataset.sources import Source
from mlx_retrieval.dataset.text_keys import text_key
from mlx_retrieval.utils.text import quantity, writable

FILE = "pairs.jsonl"
MOST = 2_000  # of validation rows, at most


@dataclass(frozen=True)
class Pairs:
    """Held-out pairs: [first text, second text, score] each."""

    pairs: list[list]

    @property
    def texts(self) -> frozenset[int]:
        """The keys of all texts, see text_keys.py."""
        return frozenset(text_key(text) for pair in self.pairs for text in pair[:2])

    def write(self, folder: Path) -> None:
        """Write pairs.jsonl into a folder that exists."""
        keys = ("sentence1", "sentence2", "score")
        rows = (dict(zip(keys, (writable(p[0]), writable(p[1]), p[2]), strict=True)) for p in self.pairs)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / FILE).write_text(text, encoding="utf-8")


def holds_pairs(folder: Path) -> bool:
    """Return whether a folder of held-out texts has pairs; else it has questions."""
    return (folder / FILE).is_file()


def read(folder: Path) -> Pairs | None:
    """Return the pairs that `Pairs.write` wrote into a folder; None = it holds no pairs."""
    if not holds_pairs(folder):
        return None
    with open(folder / FILE, encoding="utf-8") as lines:  # which end at line feeds alone: texts may have U+2028
        rows = [json.loads(line) for line in lines]
    return Pairs([[row["sentence1"], row["sentence2"], row["score"]] for row in rows])


def hold_out(source: Source, share: float, seed: int = 0) -> HeldOut:
    """Return a share of the pairs, 50 to 500 and never more than a third, and the rows without any of their texts.

    Pairs that share a text, directly or through others, stay together. Where nearly all do, none are held out.
    """
    scan = Scan(source, seed)
    if not (target := wanted(len(scan), share)):
        return HeldOut(source, len(scan), reason=f"{quantity(len(scan), 'pair')} are too few: {3 * FEWEST} are needed")
    names, nodes = np.unique(np.concatenate([scan.keys.query, scan.keys.positive]), return_inverse=True)
    nodes = nodes.astype(np.int32)
    group = groups_of(len(names), nodes[: len(scan)], nodes[len(scan) :])[nodes[: len(scan)]]  # (N,) of each pair
    sizes = np.bincount(group)
    chosen: list[int] = []
    left = target
    for number in np.random.default_rng([seed, 0x5C0]).permutation(np.flatnonzero(sizes)).tolist():
        if sizes[number] <= min(left, max(1, target // 5)):
            chosen.append(number)
            left -= int(sizes[number])
    pairs = np.flatnonzero(np.isin(group, chosen)).tolist()
    if len(pairs) < FEWEST:
        return HeldOut(source, len(scan), reason="nearly all pairs share a text with others")
    return _leaving(scan, [scan[i] for i in pairs], "all rows of one of the files share texts with them")


def take_validation(source: Source, validation: Source, seed: int = 0) -> HeldOut:
    """Return the pairs of validation rows, MOST at most, and the rows without any of their texts.

    No pairs if this would leave less than half of the rows.
    """
    order = np.random.default_rng(seed).permutation(len(validation))[:MOST]
    examples = [validation[i] for i in np.sort(order).tolist()]
    return _leaving(Scan(source, seed), examples, "most rows share a text with it", least=0.5)


def take(source: Source, pairs: Pairs, seed: int = 0) -> HeldOut:
    """Return pairs that were held out before, and the rows without their texts."""
    scan = Scan(source, seed)
    leaving = Leaving(scan, pairs.texts)
    if not leaving.leaves_rows:
        return HeldOut(source, len(scan), reason="all rows share a text with its held-out pairs")
    return leaving.held_out(pairs)


def _leaving(scan: Scan, examples: list, reason: str, least: float = 0.0) -> HeldOut:
    """Return these pairs, and the rows without their texts, unless fewer than the share `least` of them is left."""
    pairs = Pairs([[example.query, example.positive, example.scores[0]] for example in examples])
    if len({score for *_, score in pairs.pairs}) < 2:
        return HeldOut(scan.source, len(scan), reason="all of them have the same score")
    leaving = Leaving(scan, pairs.texts)
    if not leaving.leaves_rows or len(scan) - leaving.count < least * len(scan):
        return HeldOut(scan.source, len(scan), reason=reason)
    return leaving.held_out(pairs)
