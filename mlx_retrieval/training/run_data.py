"""Opens what a retrieval model's run reads: the rows that it trains on, and rows that are kept from training.

data = open_data(Settings(data=["pairs.jsonl"]))
len(data.rows)
"""

from dataclasses import dataclass, field

from mlx_retrieval.dataset.columns import parse as parse_columns
from mlx_retrieval.dataset.rows import Rows, find_validation
from mlx_retrieval.dataset.sources import Source, local, open_source
from mlx_retrieval.training.config import Settings


@dataclass
class RunData:
    """The rows of a run.

    Attributes:
        rows: to train on.
        validation: of `valid.jsonl`, for the validation loss; None = there is no such file.
        lines: (name, text) about the rows, for the run's first lines.
    """

    rows: Source
    validation: Rows | None = None
    lines: list[tuple[str, str]] = field(default_factory=list)


def open_data(settings: Settings) -> RunData:
    """Open and check all rows of a run. UserError for a source that cannot be read, or the first bad row."""
    rows = open_source(settings.data, settings.columns, settings.es_query, settings.skip_bad_rows, settings.ignore_keys)
    columns = parse_columns(settings.columns) if settings.columns else None
    files = find_validation(local(settings.data))
    validation = Rows(files, settings.skip_bad_rows, settings.ignore_keys, columns) if files else None
    lines = [("reads", line) for line in rows.readings]
    lines += [("left out", line) for line in rows.skipped[:20]]
    return RunData(rows, validation, lines)
