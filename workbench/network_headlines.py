"""How well a decoded network works, in a line: its accuracy beside that of a real one, and chance."""

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.datasets.loading import Batch
from workbench.datasets.weights import Weights
from workbench.datasets.zoo_networks import CLASSES, HELD_OUT
from workbench.decoded_networks import predict, share_correct, why_not_run


class NetworkHeadline:
    """Runs decoded networks, and the real ones beside them, on the digits held out.

    Args:
        data: What the networks are from, for their scaling and architectures.
    """

    def __init__(self, data: Weights) -> None:
        self.data, self._why_not = data, why_not_run(data)
        self._known = (-1, 0.0)  # the last real network, and its accuracy

    def __call__(self, x_hat: Float[Tensor, "1 d"], real: Batch) -> str:
        """The accuracy of a decoded network, run as the architecture of a real one; or why it is not run.

        Args:
            x_hat: The decoded network, as models see it.
            real: The real one beside it, a raw batch of one.
        """
        if self._why_not:
            return f"accuracy unknown: {self._why_not}"
        if not bool(torch.isfinite(x_hat).all()):
            return "accuracy unknown: the decoded weights are not finite"
        weights = self.data.denormalize(x_hat, real["architecture"])
        own = self._accuracy(weights, real)
        if self._known[0] != int(real["id"][0]):
            self._known = int(real["id"][0]), self._accuracy(real["x"], real)
        told = f"nearest network {100 * self._known[1]:.1f} %, chance {100 / CLASSES:.0f} %"
        return f"accuracy {100 * own:.1f} % of {HELD_OUT} digits held out ({told})"

    def _accuracy(self, weights: Float[Tensor, "1 d"], real: Batch) -> float:
        return float(share_correct(predict(weights, real["architecture"].numpy(), self.data.architectures))[0])
