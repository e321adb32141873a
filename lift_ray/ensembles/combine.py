"""Backdoor adjustment: several models, trained independently, answer together (arXiv 2501.15955).

The incomplete semantic factor of a foundation model is a confounder of picture and label. M foundation models stand for its
values, each with the probability 1 / M: P(y | do(x)) = (1 / M) sum_m P_m(y | x).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lift_ray.methods.lift import Lift


def mean_logits(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_m w_m z_m / sum w, (B, K), of M times (B, K): what the released code does with equal weights."""
    return sum((w * z for w, z in zip(weights, logits, strict=True)), torch.zeros_like(logits[0])) / sum(weights)


def mean_probabilities(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """log sum_m w_m softmax(z_m) / sum w, (B, K): what the paper's equation says, in logits that softmax gives back."""
    shares = [math.log(w / sum(weights)) for w in weights]
    return torch.stack([z.log_softmax(1) + share for z, share in zip(logits, shares, strict=True)]).logsumexp(0)


class Members:
    """Several models as one, for a checkpoint: it holds what each stores, under its name.

    Args:
        models: by name, without slashes where they are stored.
    """

    head = None

    def __init__(self, models: Mapping[str, Lift]) -> None:
        self.models = dict(models)

    def stored(self) -> dict[str, Tensor]:
        """As of a single model, under NAME/."""
        return {f"{name}/{key}": value for name, model in self.models.items() for key, value in model.stored().items()}

    def load_stored(self, state: dict[str, Tensor]) -> None:
        """Load what `stored` gave, strictly. Raises ValueError that names what is missing or too much."""
        for name, model in self.models.items():
            mine = {key.removeprefix(f"{name}/"): t for key, t in state.items() if key.startswith(f"{name}/")}
            model.load_stored(mine)
        if strange := sorted({key.split("/")[0] for key in state} - set(self.models)):
            raise ValueError(f"the checkpoint does not fit the model: it holds {', '.join(strange[:4])} too")


COMBINE: dict[str, Callable[[Sequence[Tensor], Sequence[float]], Tensor]] = {
    "logits": mean_logits,
    "probabilities": mean_probabilities,
}
