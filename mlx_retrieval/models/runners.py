"""Choose how a model's micro-batches are run on this device, compiled or not."""

from mlx_retrieval import backend
from mlx_retrieval.backbones import gradient_checkpointing
from mlx_retrieval.models.compiled_model_runner import CompiledModelRunner
from mlx_retrieval.models.cpu_model_runner import CpuModelRunner
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.model_runner import ModelRunner


def make_runner(model: RetrievalModel, compile: str = "auto") -> ModelRunner:
    """Return a runner for the model.

    Args:
        compile: one of `backend.COMPILE`. Compiled passes run on several threads on CPUs, on one elsewhere.
    """
    # Checkpointed blocks draw their dropout seeds in Python, which a compiled function would do only once.
    if not backend.compiles(compile) or gradient_checkpointing.checkpointed(model.backbone):
        return ModelRunner(model)
    return CpuModelRunner(model) if backend.FUSED else CompiledModelRunner(model)
