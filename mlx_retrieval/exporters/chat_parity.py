"""Check that an exported chat model answers as the base model with its adapter does.

    rows = conversations(ChatTokenizer(folder))
    expected = logits(adapted_model, rows)
    print(check_mlx_lm(folder, rows, expected, "bfloat16"))                # UserError if they are not close enough

Compared is the distribution of the next token after each of the last tokens of a few conversations: the mean of its
Kullback-Leibler divergence, in nats a token. Both sides compute in float32, so that the comparison is about weights and
files, not about rounding on the way.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from mlx_retrieval.backend import mx, nn

import numpy as np

from mlx_retrieval import backbones, backend
from mlx_retrieval.exporters import parity
from mlx_retrieval.training.chat.messages import Dialogue
from mlx_retrieval.training.chat.template import ChatTokenizer
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.hf_logging import quiet_transformers

# The largest divergence, in nats a token, for each form of the weights. SmolLM2-135M has 4e-8 in float32, 1e-6 in
# float16, 0.002 in bfloat16, 0.004 in 8 bits and 0.6 in 4 bits. GPUs may round the factors of float32 products (TF32).
EXACT = 1e-3 if backend.IS_GPU else 1e-4
LIMITS = {"float32": EXACT, "float16": 1e-3, "bfloat16": 0.02, "8 bits": 0.05, "4 bits": 1.0}
LONGEST = 320  # tokens of a conversation
COMPARED = 64  # its last tokens, whose logits are compared: each has one for every token of the vocabulary


def conversations(tokenizer: ChatTokenizer) -> list[np.ndarray]:
    """Return the tokens of four conversations: short, of two questions, in other scripts, and long."""
    texts = parity.check_texts(parity.LONGEST)
    talks = [texts[5:7], texts[7:11], [texts[-3], texts[-2]], [texts[-4], texts[-5]]]
    dialogues = [
        Dialogue([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(talk)])
        for talk in talks
    ]
    try:
        rows = tokenizer.tokens([tokenizer.render(dialogue) for dialogue in dialogues])
    except ValueError as error:  # the template refuses them
        raise UserError(f"a conversation for the check cannot be rendered: {error}") from error
    return [ids[:LONGEST] for ids, _ in rows]


def prepare(model: nn.Module) -> None:
    """Let a model compute in float32. On CPUs, where mlx has no fast product for quantised weights, dequantise them."""
    from mlx_lm.utils import dequantize_model

    backbones.set_dtype(model, mx.float32)
    if not backend.IS_GPU:
        dequantize_model(model)


def logits(model: Callable[[mx.array], mx.array], rows: list[np.ndarray]) -> list[np.ndarray]:
    """Return the logits of the last COMPARED tokens of every conversation, (n, V) float32 each."""
    return [np.array(model(mx.array(ids)[None])[0, -COMPARED:].astype(mx.float32)) for ids in rows]


def divergence(actual: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Return the mean divergence of the distributions of the next token from the expected ones, in nats a token."""
    values = []
    for one, other in zip(actual, expected, strict=True):
        actual_log, expected_log = _log_softmax(one), _log_softmax(other)
        values.append((np.exp(expected_log) * (expected_log - actual_log)).sum(axis=-1))
    return float(np.concatenate(values).mean())


def _log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def accept(actual: list[np.ndarray], expected: list[np.ndarray], reader: str, form: str) -> str:
    """Return a line that compares the logits that `reader` gave. UserError if they are not within LIMITS[form]."""
    if [one.shape for one in actual] != [one.shape for one in expected]:
        raise UserError(f"{reader} gives logits of other shapes: nothing was written")
    if not all(np.isfinite(one).all() for one in actual):
        raise UserError("some logits of the exported model are not finite: nothing was written")
    value, limit = divergence(actual, expected), LIMITS[form]
    if value > limit:
        raise UserError(
            f"the check failed: {reader}: a divergence of {value:.2g} nats a token from the base model with the "
            f"adapter (at most {limit:g} is allowed for {form}); nothing was written"
        )
    same = sum(int((one.argmax(-1) == other.argmax(-1)).sum()) for one, other in zip(actual, expected, strict=True))
    places = sum(map(len, expected))
    return f"{reader}: divergence {value:.1e} nats a token of at most {limit:g}, {same} of {places} likeliest equal"


def check_mlx_lm(folder: Path, rows: list[np.ndarray], expected: list[np.ndarray], form: str) -> str:
    """Check the folder with mlx-lm's own loader; see `accept`."""
    import mlx_lm

    try:
        with quiet_transformers():
            model, _ = mlx_lm.load(str(folder))
    except parity.LIBRARY_ERRORS as error:
        raise UserError(f"mlx_lm.load cannot load the folder ({type(error).__name__}: {error})") from error
    prepare(model)
    actual = logits(model, rows)
    parity.release(model)
    return accept(actual, expected, "mlx_lm.load", form)


def check_transformers(folder: Path, rows: list[np.ndarray], expected: list[np.ndarray], form: str) -> str:
    """Check the folder with transformers, if torch is installed; see `accept`."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: transformers' logits are not checked"
    import torch
    import transformers

    try:
        with quiet_transformers(), torch.no_grad():
            options = {"dtype": torch.float32, "local_files_only": True}
            model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), **options)
            batches = (torch.tensor(ids[None].astype(np.int64)) for ids in rows)
            actual = [np.array(model(batch).logits[0, -COMPARED:].tolist(), np.float32) for batch in batches]
    except parity.LIBRARY_ERRORS as error:
        raise UserError(f"transformers cannot use the folder ({type(error).__name__}: {error})") from error
    return accept(actual, expected, f"transformers {transformers.__version__}", form)
