"""Find the answers of questions in an index, where they may have other names.

from mlx_retrieval.evaluation.index_answers import checked
from mlx_retrieval.evaluation.index_search import read_queries
queries, notes = checked(read_queries("queries.jsonl"), index)
"""

from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from mlx_retrieval.evaluation.index_search import Query, Target
from mlx_retrieval.utils.errors import UserError


class Resolution(NamedTuple):
    """Queries with their answers named as in the index."""

    queries: list[Query]
    missing: list[str]  # answers that no search finds
    ambiguous: dict[str, list[str]]  # those of them whose name is the end of several paths -> these paths
    renamed: dict[str, str]  # answers that are written from another folder -> the path of the index


def wanted(queries: Sequence[Query]) -> list[str]:
    """Return the paths or document ids that the answers may have in an index."""
    targets = (target for query in queries for target in query.targets)
    return list(dict.fromkeys(name for target in targets for name in (target.path, str(target))))


def resolve(queries: Sequence[Query], paths: Sequence[str]) -> Resolution:
    """Return the queries with their answers named as in the index that holds these paths or document ids.

    "chapter:3" may be a document. A path may be written from another folder, if one path of the index ends as it does:
    from one further in, or from one further out, see `_is_from_outside`.
    """
    by_name: dict[str, list[str]] = {}
    for path in paths:
        by_name.setdefault(path.rpartition("/")[2], []).append(path)
    resolved, known = [], set(paths)
    folders = {folder for path in paths for folder in accumulate(path.split("/")[:-1], "{}/{}".format)}
    resolution = Resolution(resolved, [], {}, {})
    for query in queries:
        targets: dict[Target, int] = {}
        for target, judgement in query.targets.items():
            alike = _in_index(target, known, by_name, folders)
            if len(alike) == 1:
                if alike[0].path not in (target.path, str(target), target.path.removeprefix("./")):
                    resolution.renamed[target.path] = alike[0].path
                target = alike[0]
            elif target.path not in resolution.missing:
                resolution.missing.append(target.path)
            if len(alike) > 1:
                resolution.ambiguous[target.path] = [other.path for other in alike]
            targets[target] = max(judgement, targets.get(target, 0))
        resolved.append(query._replace(targets=targets))
    return resolution


def _in_index(target: Target, known: set[str], by_name: dict[str, list[str]], folders: set[str]) -> list[Target]:
    """Return the answers of an index that a target may mean: none, it, or several."""
    if target.path in known:
        return [target]
    if str(target) in known:
        return [Target(str(target))]
    path = target.path.removeprefix("./")
    others = by_name.get(path.rpartition("/")[2], [])
    alike = [other for other in others if f"/{other}".endswith(f"/{path}")]
    outside = [other for other in others if _is_from_outside(path, other, folders)]
    alike += [other for other in outside if other == max(outside, key=len)]  # ends of one path: the longest is meant
    return [target._replace(path=other) for other in alike]


def _is_from_outside(path: str, other: str, folders: set[str]) -> bool:
    """Return whether a path may be that of another of the index, written from a folder further out.

    docs/README.md, where docs has none, is not README.md. foo/foo/core.py is foo/core.py, of a checkout named foo.
    """
    top, folder = path.partition("/")[0], path.rpartition("/")[0]
    is_inside = folder in folders or (top in folders and not other.startswith(f"{top}/"))
    return path.endswith(f"/{other}") and not is_inside


def checked(queries: Sequence[Query], index: Any) -> tuple[list[Query], list[str]]:
    """Return the resolved queries, and notes on answers that are not found or are named otherwise; see `resolve`.

    Raises UserError if the index holds none of the answers: every figure would be 0.
    """
    paths, place = index.known(wanted(queries)), index.folder
    resolved, missing, ambiguous, renamed = resolve(queries, paths)
    in_none = _in_no_chunk(resolved, index, missing)
    lost, shown = {*missing, *in_none}, [*missing, *(f"{name} (no chunk has this line)" for name in in_none)]
    unlike = "".join(
        f"; {name} is the end of several paths: {', '.join(alike[:3])}" for name, alike in list(ambiguous.items())[:1]
    )
    if lost and all({target.path, str(target)} & lost for query in resolved for target in query.targets):
        there = f"; the index holds {paths[0]}" if paths else ""
        raise UserError(f"none of the answers, such as {shown[0]}, is in {place}{there}{unlike}")
    notes = []
    if lost:
        notes.append(f"{len(lost):,} of the answers {_are(lost)} not in {place}: no search finds {shown[0]}{unlike}")
    for name, path in list(renamed.items())[:1]:
        which = f"{len(renamed):,} of the answers {_are(renamed)} written from another folder than {place}"
        notes.append(f"{which}: {name} is taken for {path}")
    return resolved, notes


def _are(answers: Collection) -> str:
    return "is" if len(answers) == 1 else "are"


def _in_no_chunk(queries: Sequence[Query], index: Any, missing: Sequence[str]) -> list[str]:
    """Return the answers whose line no chunk of their file has: a blank one, one behind the end, one of a PDF."""
    absent = {*missing}
    targets = {t: None for query in queries for t in query.targets if t.line and t.path not in absent}
    lines = index.lines_of(list(dict.fromkeys(target.path for target in targets)))
    return [str(target) for target in targets if not any(target.line in each for each in lines.get(target.path, []))]
