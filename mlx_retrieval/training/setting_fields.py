"""Fields of `config.Settings`: what a field says about its flag and its YAML key."""

import dataclasses
import types
import typing


def option(group: str, default, help: str, **extra):
    """Return a field of `Settings` with the metadata that flags.py turns into a flag.

    `extra`: `choices`; `tasks` that the setting applies to; `words` allowed in place of a number; `aliases`, other
    flags for the setting; `mlx_lm_names`, aliases that mlx-lm's users know, which mean that chat is to be trained;
    `file_only`, there is no flag; `whole_run`, no source has its own value; `names`, what a text names, see
    setting_paths.py.
    """
    metadata = {"group": group, "help": help, **extra}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def aliases(f: dataclasses.Field) -> tuple[str, ...]:
    """Return other flags for the same setting."""
    return (*f.metadata.get("aliases", ()), *f.metadata.get("mlx_lm_names", ()))


def kind_of(f: dataclasses.Field) -> tuple[type, bool]:
    """Return (type of a value, whether it is a list) of a field annotated `T`, `T | None` or `list[T]`."""
    kind = f.type
    if isinstance(kind, types.UnionType):
        kind = next(t for t in typing.get_args(kind) if t is not type(None))
    if typing.get_origin(kind) is list:
        return typing.get_args(kind)[0], True
    return kind, False
