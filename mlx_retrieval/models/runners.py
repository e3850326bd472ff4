"""Choose how a model's micro-batches are run on this device."""

from mlx_retrieval import backend
from mlx_retrieval.backbones import gradient_checkpointing
from mlx_retrieval.models.cpu_model_runner import CpuModelRunner
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.model_runner import ModelRunner


def make_runner(model: RetrievalModel) -> ModelRunner:
    """Return a runner for the model: compiled and on several threads on CPUs, the plain one elsewhere."""
    # Checkpointed blocks draw their dropout seeds in Python, which a compiled function would do only once.
    if backend.COMPILED and not gradient_checkpointing.checkpointed(model.backbone):
        return CpuModelRunner(model)
    return ModelRunner(model)
