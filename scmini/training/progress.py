"""What a person sees of a training while it goes on, and how it hears that it is to stop."""

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from scmini import console
from scmini.errors import Interrupted
from scmini.training.tree_trainer import TreeTrainer

DRIFT = "drift/chosen_per_token"
FIGURES = {"loss": "loss", "rewards/margins": "margin", DRIFT: "drift"}
"""Metrics that stand beside the bar, and their names there."""
FALLEN = 0.5
"""Nats by which the chosen answers' tokens may become less likely than under the reference. Half a
nat makes each 0.6 times as likely, so a target of 100 tokens e^50 times less; a model that was
trained on its targets gives their tokens about one nat, so what it learned is half undone."""
FALLEN_FOR = 5
"""Steps for which they must have been that low: one odd step is none."""


class Collapse:
    """Tells when the chosen answers become unlikely: once, and again when twice as much is lost."""

    def __init__(self) -> None:
        self.limit = FALLEN
        self._step = 0
        self._since: int | None = None

    def notice(self, row: Mapping[str, Any], step: int, *, last: bool = False) -> str | None:
        """Take in a row of metrics up to `step`; a sentence if it is time to say something.

        Args:
            last: after this row nothing follows, so it need not have lasted.
        """
        before, self._step = self._step, step
        drift = row.get(DRIFT)
        if drift is None or not drift < -self.limit:
            self._since = None
            return None
        self._since = before if self._since is None else self._since
        if step - self._since < FALLEN_FOR and not last:
            return None
        self.limit, self._since = 2 * abs(drift), None
        return (
            f"step {step}: the chosen answers have become unlikely: {-drift:.2f} nats per token "
            f"below the reference, so a token of them is {math.exp(drift):.2g} times as likely as "
            "at the start. The model may unlearn what SFT taught it: set dpo.rpo_alpha (0.5, an "
            "SFT term on the chosen), lower dpo.learning_rate, raise dpo.beta, or take fewer steps "
            "(dpo.num_prompts)"
        )


class Progress(TrainerCallback):
    """Epochs as a person counts them, when to log, save and stop, the bar and the warning.

    Args:
        asked_to_stop: whether to end after this step, see `stopping`.
    """

    def __init__(
        self, trainer: TreeTrainer, steps_per_epoch: int, asked_to_stop: Callable[[], bool]
    ) -> None:
        self.trainer, self.steps_per_epoch = trainer, steps_per_epoch
        self.asked_to_stop = asked_to_stop
        self.collapse = Collapse()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A checkpoint brings those of the run that wrote it.
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps
        for row in state.log_history:  # what was said before is not said again
            self.collapse.notice(row, row["step"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / self.steps_per_epoch
        control.should_log |= state.global_step >= state.max_steps
        control.should_save |= self.trainer.overdue or self.asked_to_stop()
        if state.is_world_process_zero:
            last = state.log_history[-1] if state.log_history else {}
            figures = {name: last[key] for key, name in FIGURES.items() if key in last}
            console.progress(state.global_step, state.max_steps, "steps", **figures)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        row, step = state.log_history[-1], state.global_step
        said = self.collapse.notice(row, step, last=step >= state.max_steps)
        if said and state.is_world_process_zero:
            console.warn(said)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked_to_stop():
            raise Interrupted(f"stopped by SIGTERM; kept up to step {state.global_step}")


@contextmanager
def stopping(alone: bool) -> Iterator[Callable[[], bool]]:
    """Let SIGTERM, which is what Ctrl-C becomes for a stage, end a training after its step.

    Args:
        alone: whether this is the only process of the training. Several would have to agree on the
            step, so there the signal ends them at once.

    Yields:
        Whether the signal has come.
    """
    came = threading.Event()
    if not alone or threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
