"""Losses for long-tailed training. All take raw logits (B, K) and labels (B,) and return the mean over the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def logit_adjusted(logits: Tensor, labels: Tensor, log_prior: Tensor, *, tau: float) -> Tensor:
    """CE(z + tau * log prior, y): rare classes must win by a margin while training (arXiv 2007.07314).

    Args:
        log_prior: (K,), log of the training share of each class.
        tau: strength; 0 is plain cross-entropy.
    """
    return F.cross_entropy(logits + tau * log_prior, labels)


def cross_entropy(logits: Tensor, labels: Tensor, log_prior: Tensor) -> Tensor:
    """CE(z, y)."""
    return F.cross_entropy(logits, labels)


LOSSES: dict[str, Callable[..., Tensor]] = {"logit_adjusted": logit_adjusted, "cross_entropy": cross_entropy}
