"""Backdoor adjustment: an ensemble of models that are trained independently (arXiv 2501.15955).

The incomplete semantic factor of a foundation model is a confounder of image and label. M foundation models represent its values, each
with probability 1 / M: P(y | do(x)) = (1 / M) sum_m P_m(y | x).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def mean_logits(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return sum_m w_m z_m / sum w, (B, K), from M logits (B, K); the released code does this with equal weights."""
    return sum((w * z for w, z in zip(weights, logits, strict=True)), torch.zeros_like(logits[0])) / sum(weights)


def mean_probabilities(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return log sum_m w_m softmax(z_m) / sum w, (B, K): the paper's equation, as logits whose softmax is the mean."""
    log_weights = [math.log(w / sum(weights)) for w in weights]
    return torch.stack([z.log_softmax(1) + log_w for z, log_w in zip(logits, log_weights, strict=True)]).logsumexp(0)


COMBINE: dict[str, Callable[[Sequence[Tensor], Sequence[float]], Tensor]] = {
    "logits": mean_logits,
    "probabilities": mean_probabilities,
}
