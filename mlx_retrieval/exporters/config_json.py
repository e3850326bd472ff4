"""Make the config.json of an exported folder.

config = make(base_folder, backbone, "sentence-transformers", dtype=None)
write(folder, config)
"""

import json
from pathlib import Path

from mlx_retrieval.backbones import ENCODERS, Backbone, decoder
from mlx_retrieval.backbones.hub import read_config, tensor_table, weight_files
from mlx_retrieval.utils.errors import UserError

MARK = "mlx_retrieval"  # key of a folder that this toolkit exported, where no retrieval_config.json tells it
T5 = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}


def dropped(kind: str, form: str) -> tuple[str, ...]:
    """Return the prefixes of tensors that a model of this type does not need in this format."""
    if form != "sentence-transformers":
        return ()
    return ("lm_head.", "decoder.") if kind in T5 else ("lm_head.",)


def make(base: Path, backbone: Backbone, form: str, dtype: str | None = None) -> dict:
    """Return the config.json for the weights of `backbone`, which was loaded from the folder `base`.

    Args:
        form: one of `job.FORMATS`.
        dtype: name of the dtype that all weights were cast to; None = they kept their own.

    Raises UserError if transformers has no setting for the backbone's attention.
    """
    config = read_config(base)
    kind, names = config["model_type"], {name for file in weight_files(base) for name in tensor_table(file)}
    for key in ("quantization", "quantization_config", "_name_or_path"):
        config.pop(key, None)
    if form == "mlx" and kind not in ENCODERS:
        config |= decoder.normalised(config)
    if form != "mlx" and (translate := getattr(ENCODERS.get(kind), "for_transformers", None)):
        config = translate(config)
    inner = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    if kind not in ENCODERS:
        changes = _attention(config, backbone.bidirectional)
        if changes and inner is not config and form != "mlx":
            raise UserError(
                f"{kind}: transformers has no setting that corresponds to --bidirectional; use --format mlx"
            )
        inner |= changes
        if form == "sentence-transformers" and inner is not config:
            raise UserError(f"{kind}: sentence-transformers would also load its image encoder; use --format hf or mlx")
        if form == "sentence-transformers" or not any("lm_head" in name for name in names):
            inner["tie_word_embeddings"] = True  # there is no head, so mlx-lm must not look for one
    elif kind in T5 and (form == "sentence-transformers" or not any(name.startswith("decoder.") for name in names)):
        config["architectures"] = [T5[kind]]
    for settings in (config, inner) if dtype else ():
        settings |= {key: dtype for key in ("dtype", "torch_dtype") if key in settings}
    return config


def _attention(config: dict, bidirectional: bool) -> dict:
    """Return the config changes that force causal or bidirectional attention, against the architecture's default.

    Both transformers and `backbones.decoder` read them. They count a sliding window's tokens differently from mlx-lm.
    """
    default = decoder.naturally_bidirectional(config)
    inner = config.get("text_config") or config
    if default == bidirectional:
        return {}
    if not bidirectional:
        return {key: other for key, other in _CAUSAL.items() if key in inner}
    window = inner.get("sliding_window")
    if inner["model_type"].startswith("gemma3"):
        return {"use_bidirectional_attention": True} | ({"sliding_window": 2 * (window - 1)} if window else {})
    return {"is_causal": False} | ({"sliding_window": window - 1} if window else {})


_CAUSAL = {"is_causal": True, "use_bidirectional_attention": False}


def write(folder: Path, config: dict) -> None:
    """Write `config.json` into `folder`."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
