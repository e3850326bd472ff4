"""Whether a run fits: the lines of its first screen, and of --dry-run about Macs.

print_lines(Outlook(job).lines())                   before any weight is read
print_lines(Outlook(job).measured_lines(peak))
"""

import dataclasses
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_retrieval.backend import as_metal, device_memory
from mlx_retrieval.backend.as_metal import GIB

import numpy as np

from mlx_retrieval import backend
from mlx_retrieval.training import memory
from mlx_retrieval.training.estimate import FLOAT32, METAL, Device, Estimate, Job, estimate, here
from mlx_retrieval.utils.console import Lines
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import gb

MACS = (8, 16, 24, 32, 64)  # GiB of memory
MACOS = 3 * GIB  # for macOS and a browser: a guess
NEAR = 0.9  # flags are advised that leave a tenth free
SHOWN = 0.05 * GIB  # bytes; smaller parts of an estimate are not named
AMPLE = 0.5  # of the free memory; what fits into it needs no measurement: estimates are within a fifth
# Of a step's arrays on a CPU, what malloc holds besides as they come and go in other sizes: 3 to 8 % were measured.
HOLES = 0.08
SHORTEST = 64  # tokens, below which no shorter texts are advised


@dataclass(frozen=True)
class Outlook:
    """A job, and the memory that the process takes beside mlx's arrays, in bytes."""

    job: Job
    process: int

    @classmethod
    def of(cls, job: Job) -> "Outlook":
        """Return the outlook of a job in this process, in which no weight is read yet."""
        process = resident() + job.evaluation
        if not backend.IS_GPU:
            step = estimate(job, here()).step
            process += min(backend.CACHE_BYTES, step) + int(HOLES * step)
        if decides(job, here()):
            job = as_fits(job, here(), device_memory.free())
        return cls(job, process)

    @property
    def ample(self) -> bool:
        """Whether the usual budget takes so little that measuring passes would choose it, too."""
        return fits(_with(self.job, budget=0), here(), int(AMPLE * device_memory.free()))

    def with_budget(self, budget: int) -> "Outlook":
        """Return the outlook with the budget that passes were measured for."""
        return dataclasses.replace(self, job=_with(self.job, budget))

    def require_room(self) -> None:
        """Raise UserError if a step needs more memory than is free."""
        room = device_memory.free()
        if self.expected.total > room:
            needed = f"about {gb(self.expected.total)} GB, an estimate, and {gb(room)} GB are free"
            raise UserError(
                f"a step takes {needed}: {self._advice(room)}. With --gradient-accumulation-steps it is tried all the "
                "same, which may freeze the machine"
            )

    @property
    def expected(self) -> Estimate:
        """The estimate on this machine."""
        return estimate(self.job, here(), self.process)

    @property
    def is_tight(self) -> bool:
        """Whether the run will probably not fit into the memory of this machine."""
        needed, room = self._needed_and_room()
        return needed > room

    def _needed_and_room(self) -> tuple[int, int]:
        """Return the bytes that the run takes at most, and those that there are for it."""
        expected = self.expected
        if backend.IS_GPU:
            return expected.total, device_memory.free()
        return expected.of_process, device_memory.free() + resident()

    def lines(self) -> Lines:
        """Return a line with the estimate and what this machine has, and a warning if it does not fit."""
        expected = self.expected
        whole, (needed, room) = device_memory.total(), self._needed_and_room()
        parts = {"weights": expected.weights, "optimizer": expected.optimizer, "a step": expected.step}
        if not backend.IS_GPU:
            parts["the process itself"] = expected.process
        large = [f"{name} {gb(count)}" for name, count in parts.items() if count >= SHOWN]
        text = f"base model of {self.job.parameters:,} parameters; about {gb(needed)} GB at most, an estimate"
        text += f": {', '.join(large)}" if large else ""
        lines = [("memory", f"{text}; this machine has {gb(whole, 0)} GB, {gb(room)} free")]
        if needed > room:
            lines.append(("warning", f"this will probably not fit into {gb(room)} GB: {self._advice(room)}"))
        return lines

    def _advice(self, room: int) -> str:
        taken = 0 if backend.IS_GPU else self.process
        found = smallest_change(self.job, here(), int(NEAR * room) - taken)
        if found is None:
            return "no flag makes it fit; take a smaller or quantised model"
        flags, changed = found
        return f"{flags} would ({gb(estimate(changed, here()).total + taken)} GB)"

    def measured_lines(self, peak: int) -> Lines:
        """Return a line with the measured peak beside the estimate, and those about Macs.

        On a Mac's path, what was measured above the estimate is expected of other Macs as well.
        """
        expected = self.expected.total
        text, excess = f"{gb(peak, 2)} GB at most; {gb(expected, 2)} estimated", 1.0
        if backend.AS_METAL and self.job.width(here()) < FLOAT32:
            text += " for a Mac, which makes none of this mode's float32 copies"
        elif backend.IS_METAL:
            excess = max(1.0, peak / expected)
        return [("measured", text), *self.mac_lines(excess)]

    def mac_lines(self, excess: float = 1.0) -> Lines:
        """Return a line each for Macs of several sizes, computed in the checkpoint's dtype or that of --dtype.

        `excess`: what runs take, as a multiple of the estimate.
        """
        return [(f"Mac, {size} GB", self._mac(size, excess)) for size in MACS]

    def _mac(self, size: int, excess: float) -> str:
        whole = min(as_metal.working_set(size * GIB), size * GIB - MACOS - self.process)
        room = int(whole / excess)
        job, decided = self.job, decides(self.job, METAL)
        if decided:  # the budget that it has is this machine's
            job = dataclasses.replace(_with(job, budget=0), parts=1)
        found = smallest_change(job, METAL, room)
        if found is None:
            least = as_fits(job, METAL, room) if decided else job
            return f"does not fit: {gb(excess * estimate(least, METAL).total)} of {gb(whole)} GB"
        flags, changed = found
        chosen = ""
        if decided:
            changed = as_fits(changed, METAL, room)
            chosen = self._chosen(changed)
        needed = f"{gb(excess * estimate(changed, METAL).total)} of {gb(whole)} GB{chosen}"
        return f"fits with {flags}: {needed}" if flags else f"fits: {needed}"

    @staticmethod
    def _chosen(job: Job) -> str:
        """Return what a Mac chooses by itself, where it is not the usual."""
        if job.chat:
            return f", in {job.parts} micro-batches" if job.parts > 1 else ""
        budget = job.cutting.budget
        return f", {budget:,} tokens at once" if budget and budget < METAL.tokens else ""


def resident() -> int:
    """Return the bytes of memory that this process has taken; on macOS the most that it has had."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


# --- flags that make it fit -------------------------------------------------------------------------------------------


def smallest_change(job: Job, device: Device, room: int) -> tuple[str, Job] | None:
    """Return the first flags, and the job with them, whose estimate is within `room` bytes; None if there are none.

    First no flags, then those that cost least: they leave the result alone, then time, then change what is trained.
    """
    changes = _chat_changes(job, device) if job.chat else _changes(job, device)
    return next(((flags, each) for flags, each in changes if estimate(each, device).total <= room), None)


def decides(job: Job, device: Device) -> bool:
    """Return whether the memory that there is decides how a batch is cut."""
    return job.auto or (job.open and device.measures)


def fits(job: Job, device: Device, room: int) -> bool:
    """Return whether a step takes no more than the device's share of what the weights leave of `room` bytes."""
    needed = estimate(job, device)
    return needed.step <= device.share * (room - needed.weights - needed.optimizer)


def as_fits(job: Job, device: Device, room: int) -> Job:
    """Return the job with the largest budget, or of a chat the fewest parts, that fits; else with the least."""
    if job.chat:
        (widths,) = job.lengths
        jobs = [dataclasses.replace(job, parts=n) for n in range(1, len(widths) + 1)]
    else:
        unlimited = device.gpu and (job.auto or job.cutting.accumulation)
        largest = memory.GRID[-1] if unlimited else device.tokens
        jobs = [_with(job, budget) for budget in reversed(memory.GRID) if budget <= largest]
    return next((each for each in jobs if fits(each, device, room)), jobs[-1])


def _with(job: Job, budget: int) -> Job:
    return dataclasses.replace(job, cutting=dataclasses.replace(job.cutting, budget=budget))


def _changes(job: Job, device: Device) -> Iterator[tuple[str, Job]]:
    longest = max(int(lengths.max()) for lengths in job.lengths)
    for length in (0, *_halves(longest)):
        shorter = job if not length else _truncated(job, length)
        for checkpointed in (False, True):
            if checkpointed and job.grad_checkpoint:
                continue
            each = dataclasses.replace(shorter, grad_checkpoint=True) if checkpointed else shorter
            for budget in (0, *_budgets(each, device)):
                cutting = dataclasses.replace(each.cutting, budget=budget or each.cutting.budget)
                flags = ["--grad-checkpoint"] * checkpointed
                flags += [f"--micro-batch-tokens {budget}"] * bool(budget and not decides(job, device))
                flags += [f"--max-length {length}"] * bool(length)
                yield " ".join(flags), dataclasses.replace(each, cutting=cutting)


def _budgets(job: Job, device: Device) -> list[int]:
    """Return smaller budgets than the job's, largest first, down to one text."""
    tokens = max(int(lengths.sum()) for lengths in job.lengths)
    longest = max(int(lengths.max()) for lengths in job.lengths)
    now = min(job.cutting.budget or device.tokens, tokens)
    smaller = [budget for budget in memory.GRID if budget < now]
    return [budget for budget in reversed(smaller) if 2 * budget > longest]


def _halves(longest: int) -> list[int]:
    """Return powers of two below the longest text, down to SHORTEST."""
    return [1 << power for power in range(20, 0, -1) if SHORTEST <= 1 << power < longest]


def _truncated(job: Job, length: int) -> Job:
    return dataclasses.replace(job, lengths=tuple(np.minimum(each, length) for each in job.lengths))


def _chat_changes(job: Job, device: Device) -> Iterator[tuple[str, Job]]:
    (widths,) = job.lengths
    batch = len(widths)
    for length in (0, *_halves(int(widths.max()))):
        shorter = job if not length else _truncated(job, length)
        for checkpointed in (False, True):
            if checkpointed and job.grad_checkpoint:
                continue
            each = dataclasses.replace(shorter, grad_checkpoint=True) if checkpointed else shorter
            for parts in (0, *(n for n in range(job.parts + 1, batch + 1) if batch % n == 0)):
                flags = ["--grad-checkpoint"] * checkpointed
                flags += [f"--gradient-accumulation-steps {parts}"] * bool(parts and not decides(job, device))
                flags += [f"--max-length {length}"] * bool(length)
                yield " ".join(flags), dataclasses.replace(each, parts=parts or each.parts)
