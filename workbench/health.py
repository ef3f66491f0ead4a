"""Signs of trouble in a training, each said once: gradients that vanish or explode, over-fitting, no finite loss."""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence

VANISHING = 1e-6
EXPLODING = 10.0
OVERFITTING = 10.0
REMEMBERED = 200
FIRST_JUDGED = 20
NAMED_SAMPLES = 64


class NonFiniteError(RuntimeError):
    """The loss or the gradient became infinite or NaN; nothing of that step was kept. Or no validation was finite."""


def not_finite(step: int, row: Mapping[str, float], names: Sequence[str], last: str) -> NonFiniteError:
    """The error of a step: its figures, its samples by name, and the last good checkpoint."""
    values = ", ".join(f"{name}={value:g}" for name, value in row.items())
    more = f" and {len(names) - NAMED_SAMPLES} more" if len(names) > NAMED_SAMPLES else ""
    return NonFiniteError(
        f"step {step} is not finite ({values}); its samples are {', '.join(names[:NAMED_SAMPLES])}{more}; "
        f"the last good checkpoint is {last}. "
        "Look at these samples, lower lr, or use precision fp32, under another run name"
    )


def never_finite(last: str) -> NonFiniteError:
    """The error of a training that is to keep its best weights and has none."""
    return NonFiniteError(
        f"no validation loss was finite, so no weights are the best; the last ones are in {last}. Look at the "
        "validation samples, lower lr, or use precision fp32 or keep: last, under another run name"
    )


class Watch:
    """Looks at what a training logs anyway and prints a warning the first time that something is wrong."""

    def __init__(self) -> None:
        self.norms: deque[float] = deque(maxlen=REMEMBERED)
        self.train_loss: float | None = None
        self.said: set[str] = set()

    def step(self, step: int, loss: float, grad_norm: float) -> None:
        """Look at a training step: its loss, and the norm of its gradient before clipping."""
        if grad_norm < VANISHING:
            self._say("vanishing", f"step {step}: gradient norm {grad_norm:.1e} is below {VANISHING:g} (vanishing)")
        else:
            self._compare(step, grad_norm)
            self.norms.append(grad_norm)
        self.train_loss = loss if self.train_loss is None else 0.9 * self.train_loss + 0.1 * loss

    def validation(self, step: int, loss: float) -> None:
        """Look at a validation's loss, with the weights of the step it follows, beside the recent training loss."""
        if not math.isfinite(loss):
            self._say("not finite", f"step {step}: validation loss {loss:g} is not finite")
        elif self.train_loss is not None and loss > OVERFITTING * self.train_loss > 0:
            times = f"{loss / self.train_loss:.0f} times the recent training loss of {self.train_loss:.3g}"
            self._say("overfitting", f"step {step}: validation loss {loss:.3g} is {times} (over-fitting)")

    def _compare(self, step: int, grad_norm: float) -> None:
        """Look at a norm beside those before it that had not vanished."""
        if len(self.norms) >= FIRST_JUDGED and grad_norm > EXPLODING * (median := statistics.median(self.norms)):
            times = f"{grad_norm / median:.0f} times its median of {median:.3g}"
            self._say("exploding", f"step {step}: gradient norm {grad_norm:.3g} is {times} (exploding)")

    def _say(self, what: str, message: str) -> None:
        if what not in self.said:
            self.said.add(what)
            print(f"warning: {message}", flush=True)
