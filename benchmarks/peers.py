"""The models of both sides of a comparison, and the peer's: sentence-transformers'; not a command.

folder = peers.model_folder("minilm")                # which both sides load
model = peers.sentence_transformer(folder, 256)      # the peer's
"""

import hashlib
import os
import tempfile
from pathlib import Path

from sides import cores, in_child, minilm

CACHE = Path(tempfile.gettempdir()) / "mlx-retrieval-benchmarks"
# google/gemma-3-270m's config.json, but for the vocabulary's special tokens.
GEMMA_270M = {
    "vocab_size": 262_144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "sliding_window": 512,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}


def cached(model: str, kind: str) -> Path:
    """Return where a folder made of a model is kept: one for each folder, and another once that has changed."""
    folder = Path(model).resolve()
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    mark = repr((str(folder), [(str(path), path.stat().st_mtime_ns) for path in files]))
    return CACHE / f"{kind}-{folder.name}-{hashlib.sha256(mark.encode()).hexdigest()[:12]}"


def model_folder(name: str) -> str:
    """A folder that both sides load: `minilm`, `gemma` (gemma-3-270m's shape, random weights) or a folder's path.

    bfloat16 where there is a GPU, else float32. What has to be made is made once, in the folder for temporary files.
    """
    return in_child(_model_folder, name)


def _model_folder(name: str) -> str:
    import torch

    gpu = torch.accelerator.is_available()
    if name not in ("gemma", "minilm") and not (Path(name) / "modules.json").is_file():
        name = exported(name)
    if name != "gemma" and not gpu:
        return minilm() if name == "minilm" else name
    dtype = torch.bfloat16 if gpu else torch.float32
    target = cached(name, str(dtype).removeprefix("torch."))
    if not target.is_dir():
        made = _random_gemma() if name == "gemma" else sentence_transformer(minilm() if name == "minilm" else name)
        draft = target.with_name(f"{target.name}.new")
        made.to("cpu", dtype).save(str(draft))
        draft.rename(target)
    return str(target)


def exported(base: str) -> str:
    """Return a plain model's folder as export.py writes it for the peer.

    Of a folder as it is, the peer would take the last token, and put the chat template around each text.
    """
    from mlx_retrieval import backend

    backend.prepare()

    from mlx_retrieval.exporters.job import Export
    from mlx_retrieval.exporters.run import export

    target = cached(base, "exported")
    if not target.is_dir():
        CACHE.mkdir(exist_ok=True)
        export(Export(model=base, output=str(target)))
    return str(target)


def _random_gemma():
    """gemma-3-270m's shape with seeded weights and all-MiniLM's tokenizer, as the peer's model."""
    import torch
    from sentence_transformers import SentenceTransformer, models
    from transformers import AutoTokenizer, Gemma3TextConfig, Gemma3TextModel

    tokenizer = AutoTokenizer.from_pretrained(minilm())
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.cls_token_id}
    config = Gemma3TextConfig(**GEMMA_270M, **special, eos_token_id=tokenizer.sep_token_id)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        Gemma3TextModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        backbone = models.Transformer(folder)
        return SentenceTransformer(modules=[backbone, models.Pooling(config.hidden_size, "mean"), models.Normalize()])


class Peer:
    """A SentenceTransformer with the attributes that the evaluation reads."""

    name = "sentence-transformers"

    def __init__(self, model):
        self.model = model

    def encode(self, texts, prompt=None, show_progress=False):
        return self.model.encode(list(texts), batch_size=32, normalize_embeddings=True, show_progress_bar=False)


def late_folder(folder: str) -> str:
    """Return the folder of a late-interaction model over a backbone, with a seeded projection, that both sides read."""
    target = cached(folder, "late")
    if not target.exists():
        draft = target.with_name(f"{target.name}.{os.getpid()}")
        sentence_transformer(folder, late=True).save(str(draft))
        draft.rename(target)
    return str(target)


def add_lora(peer, rank: int, alpha: float) -> None:
    """Put LoRA without dropout on all linear layers of the peer's backbone but a pooler's."""
    import peft
    import torch

    backbone = peer[0].model
    linear = [name for name, module in backbone.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [name for name in linear if "pooler" not in name]
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets)
    peft.inject_adapter_in_model(config, backbone)  # `add_adapter` asks for a peft that is not out yet


def sentence_transformer(folder: str, max_length: int | None = None, late: bool = False, pooling: str | None = None):
    """Return the peer's model in evaluation mode, on the GPU if there is one, else on all cores.

    Args:
        late: a vector for each token, with a seeded projection if the folder has none.
        pooling: "mean" or "last"; None = as the folder says.
    """
    import torch
    import transformers
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer, models

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(cores())
    gpu = torch.accelerator.current_accelerator(check_available=True)
    model = (MultiVectorEncoder if late else SentenceTransformer)(folder, device=str(gpu or "cpu"))
    model.max_seq_length = max_length or model.max_seq_length
    if pooling:
        place = next(i for i, module in enumerate(model) if isinstance(module, models.Pooling))
        modes = {"mean": "mean", "last": "lasttoken"}
        model[place] = models.Pooling(model[place].embedding_dimension, modes[pooling])
        if pooling == "last" and place > 1:  # word weights, by which the mean of an exported folder leaves tokens out
            del model[1]
    return model.eval()
