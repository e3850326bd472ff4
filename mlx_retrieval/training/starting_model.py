"""What a run starts from: a base model, or an adapter on its base model, which goes on being trained.

    start = find(settings)                               # and what is trained, where the settings do not say
    adapter_config = start.adapt(backbone, settings)     # after the adapter, if there is one, is attached and loaded

An adapter that goes on is one adapter: a low-rank update keeps its rank, scale and layers, and weights that were
trained themselves go on from where they are, so the run's folders fit the same base model as before. With
`--train-type full` a low-rank update is merged into the weights first.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from mlx_retrieval.backbones import Backbone, lora
from mlx_retrieval.backbones.hub import read_json
from mlx_retrieval.dataset.contents import Content, of_file
from mlx_retrieval.models import kinds, loading, retrieval_config
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.training import checkpoint
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.defaults import adapter_arguments, resolve_weights
from mlx_retrieval.utils.errors import SettingError, UserError, concerning

FILES = (kinds.ADAPTERS, kinds.ADAPTER_CONFIG, loading.HEADS, retrieval_config.FILE)


@dataclass(frozen=True)
class StartingModel:
    """A base model, or an adapter on it.

    Attributes:
        name: as the user names it.
        base: the base model's name; the same without an adapter.
        adapter: the adapter's folder; None = there is none.
        config: the adapter's adapter_config.json, as far as it says what is trained; {} without an adapter.
    """

    name: str
    base: str
    adapter: Path | None = None
    config: dict = field(default_factory=dict)

    def describe(self, settings: Settings) -> str:
        """Return the model in words, for the first lines of a run."""
        if self.adapter is None:
            return self.name
        return f"{self.name} {'merged into' if self._is_merged(settings) else 'over'} {self.base}"

    def _is_merged(self, settings: Settings) -> bool:
        return self.adapter is not None and self.config["fine_tune_type"] != "full" == settings.train_type

    def adapt(self, backbone: Backbone, settings: Settings) -> dict:
        """Make the weights to train trainable; return the contents of `adapter_config.json`.

        Args:
            backbone: frozen; an adapter is attached and its weights are loaded.
        """
        if self._is_merged(settings):
            lora.merge(backbone)
        if self.adapter is None or settings.train_type == "full":
            return lora.adapt(backbone, **adapter_arguments(settings))
        settings.lora_keys = lora.attached_keys(backbone, settings.lora_keys, settings.num_layers)
        return self.config

    def contents(self) -> list[Content]:
        """Return the contents of the adapter's files; [] without an adapter."""
        files = [self.adapter / name for name in FILES] if self.adapter else []
        return [of_file(file) for file in files if file.is_file()]


@concerning("model")
def find(settings: Settings, chat: bool = False) -> StartingModel:
    """Return the model that a run starts from. What is trained is set in the settings, where they do not say.

    Args:
        chat: whether a chat model is to be trained.

    Raises UserError for an adapter of another kind of model, and for settings that contradict the adapter.
    """
    folder = Path(settings.model).expanduser()
    if not kinds.is_adapter(folder):
        resolve_weights(settings)
        return StartingModel(settings.model, settings.model)
    if not (chat and kinds.is_chat_adapter(folder)):
        kinds.refuse_others(folder, settings.model)
    if chat and not kinds.is_chat_adapter(folder):
        kind = kinds.DESCRIPTIONS[RetrievalConfig.read(folder).task]
        raise SettingError("{task} chat: {name} {kind}, and no chat model", name=settings.model, kind=kind)
    if (base := base_of(folder)) is None:
        raise UserError(f"{settings.model}: {folder / kinds.ADAPTER_CONFIG} does not name its base model as `model`")
    config = read_json(folder / kinds.ADAPTER_CONFIG)
    try:
        config = {"fine_tune_type": "lora"} | config
        kept = {name: config[name] for name in ("fine_tune_type", "num_layers")}
        _resolve_from_adapter(settings, config)
        if settings.train_type != "full" or kept["fine_tune_type"] != "full":
            kept["lora_parameters"] = config["lora_parameters"] | {"dropout": settings.lora_dropout}
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / kinds.ADAPTER_CONFIG}: not an adapter's settings ({error!r})") from error
    return StartingModel(settings.model, base, folder, kept)


def base_of(folder: Path) -> str | None:
    """Return the name of the base model that an adapter was trained on; None if its files do not say."""
    if (folder / retrieval_config.FILE).is_file():
        return RetrievalConfig.read(folder).base_model
    config = read_json(folder / kinds.ADAPTER_CONFIG)
    return config.get("model") or checkpoint.run_settings(folder).get("model")


def _resolve_from_adapter(settings: Settings, config: dict) -> None:
    """Set what is trained as an adapter's config says. SettingError for a setting that contradicts it."""
    kind, layers = config["fine_tune_type"], config["num_layers"]
    wanted = settings.train_type or kind
    if wanted not in (kind, "full"):
        reason = "its weights were trained themselves, so no low-rank update can stand for them"
        _refuse(settings, "train_type", reason if kind == "full" else f"its update is {kind}")
    if wanted == "full":
        covers = settings.num_layers in (None, -1, layers) or 0 < layers < settings.num_layers
        if not covers:
            _refuse(settings, "num_layers", f"it has changed {'all' if layers == -1 else layers} layers")
        resolve_weights(settings, {"train_type": "full", "num_layers": layers})
        return
    values = config["lora_parameters"]
    saved = {
        "train_type": kind,
        "lora_rank": values["rank"],
        "lora_alpha": round(values["scale"] * values["rank"], 6),
        "lora_dropout": float(values.get("dropout", 0.0)),
        "lora_keys": values.get("keys") or [],
        "num_layers": layers,
    }
    for name in ("lora_rank", "lora_alpha", "num_layers"):
        given = getattr(settings, name)
        if given is not None and not math.isclose(given, saved[name], rel_tol=1e-6):
            _refuse(settings, name, f"its own is {saved[name]:g}")
    resolve_weights(settings, saved)


def _refuse(settings: Settings, name: str, reason: str) -> None:
    raise SettingError(
        f"{{{name}}} {{value}}: {{adapter}} goes on as it is, and {{reason}}. Leave {{{name}}} out, or merge it into "
        "its base model first and train that folder:\n  {export}",
        value=getattr(settings, name),
        adapter=settings.model,
        reason=reason,
        export=kinds.export_command(settings.model),
    )
