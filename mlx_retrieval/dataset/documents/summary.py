"""Say what was read of a folder, in lines for the screen.

print_lines(summary(folder, counts))
print_rows("not read", ("reason", "files"), unread_rows(folder))
"""

from collections import Counter
from collections.abc import Mapping

from mlx_retrieval.dataset.documents.document_chunks import ChunkCounts
from mlx_retrieval.dataset.documents.folder import DocumentFolder, Unread
from mlx_retrieval.utils.console import Lines, visible
from mlx_retrieval.utils.text import quantity

EXAMPLES = 3  # files that are named for each reason


def summary(folder: DocumentFolder, counts: ChunkCounts) -> Lines:
    """Return what was read and left out, as names and values."""
    lines = [
        ("files read", f"{sum(folder.files.values()):,}: {_listed(folder.files)}"),
        ("not read", f"{sum(folder.reasons.values()):,}: {_listed(folder.reasons)}" if folder.reasons else "0"),
        ("left out", _listed(folder.left_out)),
        ("documents", f"{len(folder):,}"),
        ("boilerplate", f"{quantity(counts.boilerplate, 'line')} left out"),
        ("duplicates", _listed(counts.left_out)),
        ("chunks", f"{counts.chunks:,} of {quantity(counts.documents, 'document')}"),
    ]
    return [(name, value) for name, value in lines if value]


def unread_rows(folder: DocumentFolder) -> list[tuple[str, str]]:
    """Return (reason with the first files, how many files) of what is not read, the most frequent first."""
    groups: dict[str, list[Unread]] = {}
    for unread in folder.unread:
        groups.setdefault(f"parts: {unread.reason}" if unread.parts else unread.reason, []).append(unread)
    order = sorted(groups, key=lambda reason: (groups[reason][0].parts != "", -len(groups[reason])))
    return [(f"{reason}: {_examples(groups[reason])}", f"{len(groups[reason]):,}") for reason in order]


def _examples(group: list[Unread]) -> str:
    shown = []
    for unread in group[:EXAMPLES]:
        details = ", ".join(filter(None, (unread.parts, unread.detail)))
        shown.append(visible(f"{unread.path} ({details})" if details else unread.path))
    return "; ".join(shown + ["…"] * (len(group) > EXAMPLES))


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in Counter(counts).most_common())
