"""The state of a run besides weights and optimizer; saved as trainer_state.json with every step."""

from dataclasses import dataclass, field


@dataclass
class State:
    """What the next steps, evaluations and messages of a run depend on."""

    step: int = 0
    tokens: int = 0  # real tokens trained on so far
    cursor: dict = field(default_factory=dict)  # where the data source continues
    skipped_batches: int = 0  # with --skip-bad-batches
    skipped_in_a_row: int = 0  # the last ones of them, with no good batch after
    micro_batch_tokens: int = 0  # the budget, if memory decided it; see memory.py
    # Where the run was to end before it was continued with other --steps: [last step, steps taken then] of each.
    ends: list[list[int]] = field(default_factory=list)
    # Evaluations; see improvement.py.
    metric: str = ""  # the one that the run goes by
    untrained: float | None = None  # score before training; None = not known
    best: float | None = None
    best_step: int = 0  # 0 = none was better than the untrained model
    last: float | None = None  # score of the last evaluation
    evaluations_since_best: int = 0
    evaluation_due: bool = False  # this step's has begun and not ended; a resumed run begins with it
    fallen: list[str] = field(default_factory=list)  # guards that the last evaluation found below their tolerance
    # Signs that nothing is learnt; see nothing_learnt.py.
    first_loss: float | None = None
    loss_moved: bool = False  # away from the first
    has_gradient: bool = False  # some step's was not 0
    probe: list[float] = field(default_factory=list)  # numbers of the untrained model's vectors
