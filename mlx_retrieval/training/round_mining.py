"""Mine the negatives of one round with the model that the round starts from, and let a teacher judge them.

mine_round(settings_of_round, settings, [Path("adapters/rounds/rows/1.jsonl")])

Every file is mined by itself, so that the negatives of a row are documents of its own source. A killed round goes on
where it was; see mining/cache.py.
"""

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_retrieval.backend import mx

import numpy as np

from mlx_retrieval.inference import embedder
from mlx_retrieval.mining import hard_negatives
from mlx_retrieval.mining.cache import cache_folder
from mlx_retrieval.mining.output import write_rows
from mlx_retrieval.mining.run import Negatives, count_rows, mine_negatives, naming_lines, score_rows
from mlx_retrieval.mining.teacher import Teacher
from mlx_retrieval.models.kinds import detect_kind
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.run_parts import build_model
from mlx_retrieval.training.settings_checks import DISTILLING
from mlx_retrieval.training.starting_model import find as find_start
from mlx_retrieval.utils.console import print_lines
from mlx_retrieval.utils.errors import SettingError, UserError
from mlx_retrieval.utils.text import quantity

MINED = "mined"  # the folder of the mined rows, in that of the round


def mine_round(settings: Settings, whole: Settings, rows: Sequence[Path]) -> None:
    """Write the files of rows with negatives, as far as they are missing, into the folder of the round.

    Args:
        settings: of the round.
        whole: of the run of several rounds.
        rows: a file for each source.

    Raises UserError if no negative is found.
    """
    folder = settings.folder / MINED
    folder.mkdir(parents=True, exist_ok=True)
    targets = [folder / file.name for file in rows]
    mined = [_unscored(target) if whole.rounds_teacher else target for target in targets]
    wanting = [i for i, target in enumerate(targets) if not target.is_file()]
    if any(not mined[i].is_file() for i in wanting):
        _mine(settings, whole.rounds_negatives, [(rows[i], mined[i]) for i in wanting if not mined[i].is_file()])
    if whole.rounds_teacher and wanting:
        teacher = _teacher(whole)
        losses = [source.get("loss") or whole.loss for source in whole.sources] or [whole.loss] * len(rows)
        for i in wanting:
            _judge(teacher, mined[i], targets[i], losses[i] in DISTILLING)
    for i in wanting if whole.rounds_teacher else ():
        mined[i].unlink()


def _unscored(target: Path) -> Path:
    return target.with_name(f"{target.stem}-unscored.jsonl")


def _notify(message: str) -> None:
    print_lines([("mining", message)])


# --- the model --------------------------------------------------------------------------------------------------------


def _mine(settings: Settings, negatives: int, pairs: Sequence[tuple[Path, Path]]) -> None:
    """Mine negatives for each of some files, and write each into another one."""
    rules = hard_negatives.Rules(take=negatives, relative_margin=hard_negatives.RELATIVE_MARGIN)
    model = _model(settings)
    for rows, target in pairs:
        with cache_folder(target, None) as cache, naming_lines([rows]):
            mined = mine_negatives([rows], (), rules, cache, model, notify=_notify)
            if not (mined.mined.numbers >= 0).any():
                raise UserError(
                    f"{rows}: no negative was found: the rows have few documents, or all of them score above "
                    f"{1 - hard_negatives.RELATIVE_MARGIN:.0%} of the answers. mine.py negatives has flags for both"
                )
            mined.write(target, with_scores=False)
        print_lines([("mined", _describe(mined))])


def _model(settings: Settings) -> embedder.Model:
    """Return the model that the round starts from, with the prompts and lengths of its training."""
    copy = Settings(**settings.to_dict())  # what is trained is decided once more when training begins
    start = find_start(copy)
    model, retrieval, base = build_model(copy, start)
    folder = base if start.adapter else None
    return embedder.Model(model, retrieval, retrieval.tokenizer(base), settings.model, folder, settings.compile)


def _describe(negatives: Negatives) -> str:
    """Return the counts and scores of what was mined, in words."""
    mined, texts = negatives.mined, negatives.texts
    taken = mined.numbers[texts.row_query] >= 0
    without = int((~taken.any(axis=1)).sum())
    positives, others = mined.known[texts.row_pairs].mean(), mined.scores[texts.row_query][taken].mean()
    return (
        f"{quantity(int(taken.sum()), 'negative')} for {quantity(len(taken), 'row')}, {without:,} of them without; "
        f"mean scores: {positives:.3f} of positives, {others:.3f} of negatives"
    )


# --- the teacher ------------------------------------------------------------------------------------------------------


def check_teacher(settings: Settings) -> None:
    """Raise UserError if the folder of the teacher, if there is to be one, cannot be read."""
    if settings.rounds_teacher:
        with _naming_teacher(settings.rounds_teacher):
            detect_kind(settings.rounds_teacher)


def _teacher(settings: Settings) -> Teacher:
    gc.collect()  # the model that has mined
    mx.clear_cache()
    with _naming_teacher(settings.rounds_teacher):
        return Teacher(settings.rounds_teacher)


@contextmanager
def _naming_teacher(name: str) -> Iterator[None]:
    """Name the teacher by its own flag in UserErrors of this block."""
    try:
        yield
    except UserError as error:
        reason = str(error).removeprefix(f"--model {name}: ").removeprefix(f"{name}: ")
        raise SettingError("{rounds_teacher} {name}: {reason}", name=name, reason=reason) from error


def _judge(teacher: Teacher, mined: Path, target: Path, is_distilled: bool) -> None:
    """Score a file of rows with the teacher.

    Args:
        is_distilled: keep the scores, and all negatives; else drop both the scores and the negatives that are too good.
    """
    scored = target if is_distilled else target.with_name(f"{target.stem}-scored.jsonl")
    if not scored.is_file():
        counts, skipped = count_rows([mined])
        with cache_folder(scored, None) as cache, naming_lines([mined]):
            score_rows([mined], scored, teacher, counts, cache, skipped, _notify)
    if is_distilled:
        print_lines([("teacher", f"{teacher.model.name} has scored them")])
        return
    dropped = [0, 0]
    write_rows(target, _without_rivals(scored, dropped))
    scored.unlink()
    share = f"{dropped[0]:,} of {quantity(dropped[1], 'negative')}"
    print_lines([("teacher", f"{teacher.model.name} takes {share} for answers; they are left out")])


def _without_rivals(scored: Path, counts: list[int]) -> Iterator[dict[str, Any]]:
    """Yield scored rows without their scores, and without the negatives that score nearly as high as a positive.

    Args:
        counts: to which the negatives that are left out, and all negatives, are added.
    """
    rules = hard_negatives.Rules(relative_margin=hard_negatives.RELATIVE_MARGIN)
    with open(scored, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            scores, count = row.pop("scores"), len(row["negatives"])
            positives, others = scores[: len(scores) - count], scores[len(scores) - count :]
            there = np.ones((1, count), bool)
            mask, _ = hard_negatives.passing(there, np.array([others], np.float64), np.array([min(positives)]), rules)
            counts[0] += int((~mask).sum())
            counts[1] += count
            row["negatives"] = [text for text, stays in zip(row["negatives"], mask[0], strict=True) if stays]
            yield row
