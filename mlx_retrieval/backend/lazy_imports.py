"""Modules that are imported when something of them is used, and not before; and imports of very many modules.

transformers imports torch where it is installed, and mlx-lm imports wandb: together more than a second at the start of
every command, for nothing that MLX needs. Called by backend.py; it imports neither mlx nor the toolkit.
"""

import gc
import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

_loading = threading.RLock()


class _Deferred(ModuleType):
    """Stands in `sys.modules` with a module's name, file and spec; any other attribute is the moment to load it.

    Unlike `importlib.util.LazyLoader`'s, which is loaded by whoever merely asks whether it is installed. What the
    module is a package of is unknown before, so that importing a part of it loads it, too.
    """

    def __getattr__(self, name: str) -> Any:
        place = self.__spec__.name
        if sys.modules.get(place, self) is not self:  # imported by somebody while this was `out_of_sight`
            return getattr(importlib.import_module(place), name)
        with _loading:  # whoever comes second waits until everything is there; who comes again is the module itself
            if "__begun__" not in self.__dict__ and type(self) is _Deferred:
                self.__begun__ = True
                self._load()
            elif type(self) is _Deferred:
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} yet")
        return getattr(self, name)

    def _load(self) -> None:
        spec = self.__spec__
        sys.modules[spec.name] = self  # where its own parts look for it, also while this is `out_of_sight`
        if spec.submodule_search_locations is not None:
            self.__path__ = spec.submodule_search_locations
        try:
            spec.loader.exec_module(self)
        except BaseException:  # Ctrl-C, too: half a module is none
            sys.modules.pop(spec.name, None)  # as after any import that fails
            raise
        finally:
            del self.__begun__  # whoever tries again is told the same reason
        object.__setattr__(self, "__class__", ModuleType)


class _Parts:
    """Finds parts of deferred packages that came with the package.

    Whoever imports `torch.distributed` first loads torch by it, which imports that part itself; Python would then run
    the part once more, and torch ends the process for that.
    """

    names: ClassVar[set[str]] = set()

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        package, dot, _ = name.partition(".")
        if not dot or package not in cls.names or target is not None or name not in sys.modules:
            return None
        return importlib.util.spec_from_loader(name, _There(sys.modules[name]))


class _There:
    """Loads a module that is there."""

    def __init__(self, module: ModuleType):
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: Any) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # its own, which Python has just replaced


def defer(*names: str) -> None:
    """Let these modules be loaded when they are first used. Those already loaded or not installed stay as they are."""
    if _Parts not in sys.meta_path:
        sys.meta_path.insert(0, _Parts)
    for name in names:
        if name in sys.modules or (spec := importlib.util.find_spec(name)) is None:
            continue
        module = _Deferred(name)
        module.__spec__, module.__file__, module.__loader__ = spec, spec.origin, spec.loader
        sys.modules[name] = module
        _Parts.names.add(name)


@contextmanager
def out_of_sight() -> Iterator[None]:
    """Here, what is deferred and not loaded is in no table of modules: matplotlib takes any torch there for one in use,
    and asks each array whether it is a tensor."""
    with _loading:
        hidden = {name: module for name, module in list(sys.modules.items()) if type(module) is _Deferred}
        for name in hidden:
            del sys.modules[name]
    try:
        yield
    finally:
        for name, module in hidden.items():
            sys.modules.setdefault(name, module)  # unless somebody has imported it meanwhile


@contextmanager
def many_imports() -> Iterator[None]:
    """Import here what brings thousands of modules along. Looking for garbage among their objects, which are there to
    stay, is a third of the time that such imports take; and no later collection looks through them again."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
