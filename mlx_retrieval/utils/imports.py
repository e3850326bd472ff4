"""Import less at the start of a command, and faster."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_hidden: set[str] = set()


def hide(*packages: str) -> None:
    """Make installed packages count as missing in this process, until `reveal`. Packages in use stay.

    For commands alone: transformers imports torch, and mlx-lm imports wandb, wherever they are installed. Together that
    doubles the time to a first result, for nothing that MLX needs. transformers does not look for torch twice.
    """
    for name in packages:
        if name not in sys.modules:
            sys.modules[name] = None  # Python's own sign for "not to be imported"
            _hidden.add(name)


def reveal(*packages: str) -> None:
    """Let packages that `hide` hid be imported again."""
    for name in _hidden.intersection(packages):
        _hidden.discard(name)
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
