"""Settings as a YAML file: one key for every field of `config.Settings`.

write_yaml(settings, Path("adapters/config.yaml"))
settings = Settings(**read_yaml(Path("adapters/config.yaml")))
"""

import dataclasses
from pathlib import Path

from mlx_retrieval.dataset.columns import ELASTIC_DEFAULT
from mlx_retrieval.training import source_settings
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.setting_fields import aliases, kind_of
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import Place, UserError, near_miss


def write_yaml(settings: Settings, path: Path) -> None:
    """Write the settings of a new run like this one to a YAML file, in one piece, valid in any current folder.

    With `--config`, they neither continue a run nor remove one.
    """
    import yaml

    again = dataclasses.replace(
        settings.with_absolute_paths(), resume=False, overwrite=False, accept_changed_data=False
    )
    values = again.to_dict()
    if again.sources:
        del values["data"]  # theirs
    else:
        del values["sources"]
    files.write_file(path, yaml.safe_dump(values, sort_keys=False))


def read_yaml(path: Path) -> dict:
    """Return the settings in a YAML file. UserError, with the line, for an unknown key or a value of a wrong type."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        values = yaml.safe_load(text) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        place = Place(path, error.problem_mark.line + 1 if error.problem_mark else None)
        raise UserError(f"--config {place}: not valid YAML ({error.problem})") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that no calendar has
        raise UserError(f"--config {path}: not valid YAML ({str(error).splitlines()[0]})") from error
    except RecursionError as error:
        raise UserError(f"--config {path}: nested too deeply") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: not a list of `key: value`")
    fields = {name: f for f in dataclasses.fields(Settings) for name in (f.name, *map(_key, aliases(f)))}
    loader = yaml.SafeLoader(text)
    nodes = _entries(loader, loader.get_single_node(), path) if values else {}
    clean = {}
    if "sources" in values:
        clean["sources"] = _sources(values.pop("sources"), nodes["sources"], path, loader)
        if "data" in values:
            raise UserError(
                f"--config {Place(path, _line(nodes['data']))}: data beside sources, which say what is read"
            )
    for key, value in values.items():
        name, where = str(key).replace("-", "_"), f"--config {Place(path, _line(nodes[str(key)]))}"
        if name not in fields:
            raise UserError(f"{where}: unknown key {_shown(key)}{near_miss(name, fields)}")
        if name == "es_fields" and value == ELASTIC_DEFAULT:
            continue  # saved by an earlier version, where it was the default
        clean[fields[name].name] = _checked(fields[name], value, f"{where}: {key}")
    return clean


def _entries(loader, node, path: Path) -> dict:
    """Return the nodes, (key, value), of a YAML mapping by their keys, merged ones (<<) included.

    UserError, with the line, for a key that is there twice, of which YAML takes the last.
    """
    seen = set()
    for key, _ in node.value:
        if str(key.value) in seen:
            raise UserError(f"--config {Place(path, key.start_mark.line + 1)}: {key.value} is there twice")
        seen.add(str(key.value))
    loader.flatten_mapping(node)
    return {str(loader.construct_object(key, deep=True)): (key, value) for key, value in node.value}


def _line(nodes) -> int:
    """Return the line, counted from 1, of a key of `_entries`."""
    return nodes[0].start_mark.line + 1


def _sources(values, nodes, path: Path, loader) -> list[dict]:
    """Return the mappings under `sources`. UserError, with the line, as `read_yaml`."""
    if not isinstance(values, list) or not values or not all(isinstance(source, dict) for source in values):
        line = _line(nodes)
        raise UserError(f"--config {Place(path, line)}: sources: not a list of mappings, each with a key `data`")
    known = source_settings.own_fields(dataclasses.fields(Settings))
    names = (*source_settings.OF_DATA, *known)
    clean = []
    for source, its_node in zip(values, nodes[1].value, strict=True):
        entries, checked = _entries(loader, its_node, path), {}
        for key, value in source.items():
            name = str(key).replace("-", "_")
            where = f"--config {Place(path, _line(entries[str(key)]))}"
            if name not in names:
                raise UserError(f"{where}: unknown key {_shown(key)} of a source{near_miss(name, names)}")
            if value is None:
                continue
            if name in known:
                checked[name] = _checked(known[name], value, f"{where}: {key}")
            elif name == "weight":
                checked[name] = _scalar(float, value, f"{where}: {key}")
            else:
                texts = [
                    _scalar(str, text, f"{where}: {key}") for text in (value if isinstance(value, list) else [value])
                ]
                checked[name] = texts if isinstance(value, list) else texts[0]
        if "data" not in checked:
            raise UserError(f"--config {Place(path, its_node.start_mark.line + 1)}: a source without a key `data`")
        clean.append(checked)
    return clean


def _checked(f: dataclasses.Field, value, where: str):
    """Return a YAML value as the field's type."""
    kind, many = kind_of(f)
    if many and not (value is None and f.default is None):
        if not isinstance(value, list):
            value = [value]
        return [_scalar(kind, item, where) for item in value]
    if (value is None and f.default is None) or (isinstance(value, str) and value in f.metadata.get("words", ())):
        return value
    value = _scalar(kind, value, where)
    if "choices" in f.metadata and value not in f.metadata["choices"]:
        choices = f.metadata["choices"]
        raise UserError(f"{where}: {_shown(value)} is not one of {', '.join(choices)}{near_miss(value, choices)}")
    return value


def _scalar(kind: type, value, where: str):
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:  # YAML reads 1e-3 as a text
            return float(value)
        except (ValueError, OverflowError) as error:
            raise UserError(f"{where}: {_shown(value)} is not a number") from error
    if type(value) is not kind:
        raise UserError(f"{where}: {_shown(value)} is not of type {kind.__name__}")
    return value


def _shown(value) -> str:
    """Return a YAML value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _key(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
