"""Defaults of settings that depend on the model: the learning rate, the loss and its temperature, what is trained.

resolve_weights(settings)                                # a LoRA of all layers, where the settings do not say
resolve_defaults(settings, parameters=22_000_000)        # {"learning_rate", "loss", "temperature"}
"""

from typing import Any

from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.settings_checks import TEMPERATURE, UNSCALED

# The default loss of each kind of reranker.
RERANKER_DEFAULTS = {"qwen3": "yes_no", "cross-encoder": "list_bce", "listwise": "list_softmax"}

# Default learning rates, of models with less than SMALL parameters and of larger ones; lora: of any low-rank update.
SMALL = 10_000_000
SMALL_RATES = {"lora": 4e-3, "full": 2e-3}
RATES = {"lora": 2e-4, "full": 2e-5}

# What is trained by default: settings that an adapter given as --model decides otherwise.
WEIGHTS = {
    "train_type": "lora",
    "lora_rank": 16,
    "lora_alpha": 32.0,
    "lora_dropout": 0.0,
    "lora_keys": [],
    "num_layers": -1,
}


def resolve_defaults(settings: Settings, parameters: int, reranker: str = "") -> set[str]:
    """Set the learning rate, loss and temperature of settings that lack them. Return which were set.

    A source whose loss has another default temperature than the run's gets its own, unless the run's is given.

    Args:
        parameters: of the model.
        reranker: the kind of reranker that it is; "" = none.
    """
    kind = "full" if settings.train_type == "full" else "lora"
    defaults = {"learning_rate": (SMALL_RATES if parameters < SMALL else RATES)[kind]}
    if settings.task != "chat":
        defaults["loss"] = RERANKER_DEFAULTS.get(reranker, "info_nce")
        defaults["temperature"] = _temperature(settings.loss or defaults["loss"], reranker)
        if settings.temperature is None:
            sources = [_with_temperature(source, defaults["temperature"], reranker) for source in settings.sources]
            settings.sources = sources
    missing = {name for name in defaults if getattr(settings, name) is None}
    for name in missing:
        setattr(settings, name, defaults[name])
    return missing


def _temperature(loss: str, reranker: str) -> float:
    """Return the default temperature of a loss. `reranker`: as of `resolve_defaults`."""
    if reranker not in ("qwen3", "cross-encoder") or loss in UNSCALED:
        return TEMPERATURE
    return 0.1 if loss == "info_nce" else 1.0


def _with_temperature(source: dict[str, Any], of_run: float, reranker: str) -> dict[str, Any]:
    """Return a source with the default temperature of its own loss, if that is another than the run's."""
    if source.get("loss") is None or source.get("temperature") is not None:
        return source
    own = _temperature(source["loss"], reranker)
    return source if own == of_run else source | {"temperature": own}


def resolve_weights(settings: Settings, adapter: dict[str, Any] | None = None) -> None:
    """Set what is trained, where settings do not say: as in `adapter`, which goes on being trained, or by default.

    `adapter`: values of some of these settings.
    """
    for name, value in (WEIGHTS | (adapter or {})).items():
        if getattr(settings, name) in (None, []):
            setattr(settings, name, value)


def adapter_arguments(settings: Settings) -> dict[str, Any]:
    """Return the arguments of `backbones.lora.adapt`."""
    given = {name: getattr(settings, name) for name in WEIGHTS if getattr(settings, name) is not None}
    return {name.removeprefix("lora_"): value for name, value in (WEIGHTS | given).items()}
