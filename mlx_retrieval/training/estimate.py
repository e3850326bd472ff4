"""How much memory a run takes at its peak, calculated from sizes before any weight is read.

estimate(job, HERE).total                       bytes on this machine, as backend.peak_memory() will report them
estimate(job, METAL).total                      on a Mac, in the checkpoint's dtype

The job's sizes come from its settings, config.json and the headers of the safetensors (estimate_job.py). That covers
mlx's arrays alone; `Estimate.process` is what the process takes beside them.
"""

import dataclasses
from dataclasses import dataclass

from mlx_retrieval.backend import device_memory

import numpy as np

from mlx_retrieval import backend
from mlx_retrieval.backbones.activations import (
    Passes,
    Sizes,
    activations,
    kept_activations,
    language_model_activations,
)
from mlx_retrieval.models import batching
from mlx_retrieval.models.cpu_model_runner import held_bytes
from mlx_retrieval.training.cutting import Cutting
from mlx_retrieval.training.step_memory import StepMemory, loss_of_tokens

FLOAT32 = 4  # bytes
# Of a chat step, which mlx-lm compiles together with the update: gradients and both moments; accumulated gradients too.
CHAT_UPDATE, CHAT_ACCUMULATED = 3, 4


@dataclass(frozen=True)
class Device:
    """How a kind of device computes.

    Attributes:
        gpu: whether it is one: it computes in the checkpoint's dtype.
        compiled: whether passes are compiled, unless the settings say otherwise.
        fused: whether attention is written out for CPUs, and compiled passes have merged adapters.
        workers: micro-batches computed at the same time.
        tokens: of a micro-batch at most, unless the settings say otherwise.
        grid: padded lengths are multiples of it.
        overhead: of a micro-batch, in tokens; see `Cutting`.
        share: of the free memory, what a run may plan with.
        measures: whether a run whose settings leave its budget open takes what fits, up to `tokens`.
        products: bytes of products that a step keeps for its gradient, at most.
    """

    gpu: bool
    compiled: bool
    fused: bool
    workers: int
    tokens: int
    grid: int
    overhead: int = backend.CPU_OVERHEAD
    share: float = device_memory.CPU_SHARE
    measures: bool = False
    products: int = device_memory.LEAST_KEPT


METAL = Device(
    gpu=True,
    compiled=False,
    fused=False,
    workers=1,
    tokens=backend.GPU_TOKENS,
    grid=backend.GPU_GRID,
    overhead=backend.METAL_OVERHEAD,
    share=device_memory.GPU_SHARE,
    measures=True,
)


def here() -> Device:
    """Return the device of this process."""
    return Device(
        backend.IS_GPU,
        backend.COMPILED,
        backend.FUSED,
        backend.WORKERS,
        backend.MICRO_BATCH_TOKENS,
        backend.LENGTH_GRID,
        backend.MICRO_BATCH_OVERHEAD,
        device_memory.share(),
        backend.IS_METAL,
        device_memory.for_products(),
    )


@dataclass(frozen=True)
class Job:
    """All that decides the memory of a run. Numbers are counts of numbers, unless they say bytes.

    Attributes:
        parameters: of the model, in a human's count.
        numbers: floating-point numbers of the weights; `unused`, those of them that only CPUs read.
        integers: bytes of quantised weights.
        copies: numbers of the float32 copies that CPUs compute with in place of quantised weights; 0 = there are none.
        copied_scales, copied_integers: of the weights that these stand for, parts of `numbers` and `integers`.
        block: bytes of the weights that are dequantised at once, each for its product.
        layer: parameters of a layer, by which CPUs cut batches.
        checkpoint: bytes of a number in the checkpoint.
        dtype: bytes of a number that --dtype asks for; 0 = none in particular, see `width`.
        float16: whether half precision is float16, and not bfloat16.
        trained: numbers that are trained.
        new: those of them that are new, as an adapter's are, and float32 on every device.
        merged, product: of weights that a CPU merges with adapters, and of their products for a token.
        lengths: of sample batches, the tokens of each text.
        representation: numbers of a text's representation, or of a token's if `token_vectors`.
        queries: of each batch's texts, how many are queries, the first ones; needed with token_vectors.
        auto: whether the budget is chosen by the memory there is (--micro-batch-tokens auto).
        open: whether the settings leave the budget to the device, or of a chat's batches their number of parts.
        evaluation: bytes of the vectors and texts that an evaluation holds outside mlx.
        compile: whether passes are compiled; one of `backend.COMPILE`.
        chat: whether language modelling is trained, on rows of these lengths.
        parts: chat: micro-batches of a batch.
        averaged: whether a moving average of the trained weights is kept.
    """

    sizes: Sizes
    parameters: int
    numbers: int
    unused: int
    integers: int
    checkpoint: int
    trained: int
    new: int
    merged: int
    product: int
    lengths: tuple[np.ndarray, ...]
    representation: int
    token_vectors: bool
    dtype: int = 0
    float16: bool = False
    queries: tuple[int, ...] = ()
    train_type: str = "lora"
    rank: int = 0
    trained_layers: int = -1
    grad_checkpoint: bool = False
    cutting: Cutting = Cutting()
    auto: bool = False
    open: bool = False
    evaluation: int = 0
    compile: str = "auto"
    chat: bool = False
    parts: int = 1
    averaged: bool = False
    copies: int = 0
    copied_scales: int = 0
    copied_integers: int = 0
    block: int = 0
    layer: int = batching.MEASURED_LAYER

    def width(self, device: Device) -> int:
        """Return the bytes of a number that a device computes with."""
        return self.dtype or (self.checkpoint if device.gpu else FLOAT32)

    @property
    def grads(self) -> int:
        """The bytes of the gradients, which are float32 whatever the weights are; a moment has as many."""
        return FLOAT32 * self.trained


@dataclass(frozen=True)
class Estimate:
    """The memory of a run at its peak, in bytes. The first three are mlx's arrays."""

    weights: int
    optimizer: int
    step: int
    process: int = 0  # beside mlx's arrays

    @property
    def total(self) -> int:
        """Return the peak of mlx's arrays."""
        return self.weights + self.optimizer + self.step

    @property
    def of_process(self) -> int:
        """Return the peak of the whole process."""
        return self.total + self.process


def estimate(job: Job, device: Device, process: int = 0) -> Estimate:
    """Return what a run takes at most on a device; `process`: see `Estimate`."""
    device = _as_asked(device, job)
    width = job.width(device)
    merging = device.compiled and device.fused
    used = job.numbers - (0 if merging or job.chat else job.unused)
    integers = job.integers
    if not device.gpu:
        used += job.copies - job.copied_scales
        integers += job.block * device.workers - job.copied_integers
    masters = FLOAT32 * (job.trained - job.new) if width < FLOAT32 else 0  # of weights in half precision: optimizer.py
    weights = width * used + FLOAT32 * job.new + integers
    if job.chat:
        step = _chat_step(job, device, width)
        updates = CHAT_ACCUMULATED if job.parts > 1 else CHAT_UPDATE
        return Estimate(weights, updates * job.grads + masters, step, process)
    step = step_memory(job, device)
    cutting = dataclasses.replace(
        job.cutting,
        default=device.tokens,
        grid=device.grid,
        overhead=device.overhead if device.gpu else batching.cpu_overhead(job.layer),
        round_rows=step.compiled and not device.fused,
    )
    peak = max(step.peak(lengths, cutting) for lengths in job.lengths)
    average = FLOAT32 * job.trained * job.averaged
    return Estimate(weights, 2 * job.grads + masters + average, peak, process)


def step_memory(job: Job, device: Device) -> StepMemory:
    """Return what a retrieval model's steps take on a device."""
    width = job.width(device)
    passes = _passes(job, device, width)

    def of_pass(rows: int, length: int) -> float:
        # Gradients come while activations go, so that both are never whole at once.
        return max(job.grads, width * activations(job.sizes, passes, rows, length, job.rank))

    def kept(rows: int, length: int) -> float:
        return width * kept_activations(job.sizes, passes, rows, length, job.rank)

    def held(tokens: int, in_passes: int) -> int:
        return held_bytes(FLOAT32 * job.merged, FLOAT32 * job.product, tokens, in_passes, device.products)

    return StepMemory(
        of_pass,
        kept,
        representation=FLOAT32 * job.representation,
        grads=job.grads,
        token_vectors=job.token_vectors,
        compiled=device.compiled and not job.grad_checkpoint,
        workers=device.workers if passes.how == "compiled" else 1,
        loss=max(map(loss_of_tokens, job.lengths, job.queries)) if job.token_vectors else 0,
        held=held if passes.how == "compiled" else lambda tokens, in_passes: 0,
    )


def _as_asked(device: Device, job: Job) -> Device:
    """Return the device with passes compiled or not, as the job asks."""
    return device if job.compile == "auto" else dataclasses.replace(device, compiled=job.compile == "on")


def _passes(job: Job, device: Device, width: int) -> Passes:
    # Compiled as for GPUs, they take what plain ones take within 10 % (float32 above, half precision below).
    how = "compiled" if device.compiled and device.fused else "plain"
    if job.grad_checkpoint:
        how = "checkpointed" if device.fused else "plain checkpointed"
    half = width < FLOAT32
    return Passes(how, job.train_type, half, job.trained_layers, half and job.float16)


def _chat_step(job: Job, device: Device, width: int) -> int:
    """Return what a step takes on the longest conversations."""
    (lengths,) = job.lengths
    part = np.array_split(np.sort(lengths), min(job.parts, len(lengths)))[-1]
    rows, length = len(part), int(part.max())
    return round(width * language_model_activations(job.sizes, _passes(job, device, width), rows, length))
