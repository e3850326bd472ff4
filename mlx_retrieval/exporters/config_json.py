"""The config.json of an exported folder, and what llama.cpp's converter can make of it.

    config = make(base_folder, backbone, "sentence-transformers", dtype=None)
    lines = settle_gguf(config, backbone, retrieval, tokenizer)        # UserError where a GGUF would compute otherwise

Used by export.py; tested by `python -m pytest tests/test_export.py`.
"""

import json
from pathlib import Path

from mlx_retrieval.backbones import ENCODERS, Backbone, decoder
from mlx_retrieval.backbones.hub import read_config, tensor_table, weight_files
from mlx_retrieval.utils.errors import UserError

T5 = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}


def dropped(kind: str, form: str) -> tuple[str, ...]:
    """Beginnings of the names of tensors that a model of this type has no use for in this form."""
    if form != "sentence-transformers":
        return ()
    return ("lm_head.", "decoder.") if kind in T5 else ("lm_head.",)


def make(base: Path, backbone: Backbone, form: str, dtype: str | None = None) -> dict:
    """config.json for the weights of `backbone`, which came from the folder `base`, in one of export.FORMATS.

    dtype: name of the dtype that all weights were cast to; None: they have kept theirs.
    Raises UserError where transformers has no setting for how the backbone attends.
    """
    config = read_config(base)
    kind, names = config["model_type"], {name for file in weight_files(base) for name in tensor_table(file)}
    for key in ("quantization", "quantization_config", "_name_or_path"):
        config.pop(key, None)
    if form == "mlx" and kind not in ENCODERS:
        config |= decoder.normalised(config)
    inner = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    if kind not in ENCODERS:
        changes = _attention(config, backbone.bidirectional)
        if changes and inner is not config and form != "mlx":
            raise UserError(f"{kind}: transformers has no setting for --bidirectional in it; use --format mlx")
        inner |= changes
        if form == "sentence-transformers" and inner is not config:
            raise UserError(f"{kind}: sentence-transformers would load its image part as well; use --format hf or mlx")
        if form == "sentence-transformers" or not any("lm_head" in name for name in names):
            inner["tie_word_embeddings"] = True  # there is no head, and mlx-lm is not to look for one
    elif kind in T5 and (form == "sentence-transformers" or not any(name.startswith("decoder.") for name in names)):
        config["architectures"] = [T5[kind]]
    for settings in (config, inner) if dtype else ():
        settings |= {key: dtype for key in ("dtype", "torch_dtype") if key in settings}
    return config


def _attention(config: dict, bidirectional: bool) -> dict:
    """What makes transformers, and `models.decoder` again, see right and left as this model was told to, not by nature.

    Both have a number for windows that is not what a window of W tokens to either side is called in mlx-lm.
    """
    natural = decoder.naturally_bidirectional(config)
    inner = config.get("text_config") or config
    if natural == bidirectional:
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
