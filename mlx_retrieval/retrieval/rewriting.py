"""Make the words of an index again, for another language, other weights or a newer analysis; nothing is embedded.

    index = rewrite(Index.open(".index"), fields={"path": 1, "name": 4, "doc": 2, "text": 1})

The new index grows beside the old one, which answers until it is replaced, as with --rebuild.
"""

import dataclasses
from typing import Any

from mlx_retrieval.retrieval import index_folder
from mlx_retrieval.retrieval.analyzer import ANALYSIS
from mlx_retrieval.retrieval.base import VERSION
from mlx_retrieval.retrieval.lance_index import Index
from mlx_retrieval.utils.progress import progress_bar


def rewrite(index: Index, **settings: Any) -> Index:
    """Return the index with these settings (see base.IndexInfo) and the words that they give.

    The caller holds the lock of the index's folder.
    """
    was_complete = index.info.complete
    info = dataclasses.replace(index.info, version=VERSION, analysis=ANALYSIS, partitioned=0, **settings)
    new = Index.create(index.folder / index_folder.REBUILT, info)
    with progress_bar("indexing words", "chunks", index.count()) as progress:
        new.copy(index, progress)
    new.finish()
    if not was_complete:
        new.info.complete = False
        new.write()
    index_folder.install(index.folder)
    return Index.open(index.folder)
