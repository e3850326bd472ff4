"""Import less at the start of a command, and faster."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def hide(*packages: str) -> None:
    """Make installed packages count as missing in this process, until `reveal`. Packages in use stay.

    For commands alone: transformers imports torch, and mlx-lm imports wandb, wherever they are installed. Together that
    doubles the time to a first result, for nothing that MLX needs. transformers does not look for torch twice.
    """
    for name in packages:
        sys.modules.setdefault(name, None)  # Python's own sign for "not to be imported"


def reveal(*packages: str) -> None:
    """Let hidden packages be imported again."""
    for name in packages:
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]


@contextmanager
def many_imports() -> Iterator[None]:
    """Import here a package that brings thousands of modules: garbage collection would take a third of the time.

    Their objects stay, so later collections do not look through them either.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
