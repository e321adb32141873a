"""Losses for long-tailed training, as factories: what depends on the class counts is computed once, before the first step.

Every kind is a function of the training images per class, `counts` (K,), all over 0 and on the device of the logits. It
returns the loss: raw logits z (B, K) and labels y (B,) -> the mean over the batch. No loss reads a value back to the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lift_ray.model.device import counting_device

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(counts: Tensor, *, label_smoothing: float = 0.0) -> Loss:
    """CE(z, y), whatever the counts.

    Args:
        label_smoothing: part of the target that is spread over all classes (arXiv 1512.00567).
    """
    return partial(F.cross_entropy, label_smoothing=label_smoothing)


def focal(counts: Tensor, *, gamma: float) -> Loss:
    """(1 - p_y)^gamma CE(z, y), p = softmax(z): easy images count less (arXiv 1708.02002).

    Args:
        gamma: strength, at least 0; 0 is plain cross-entropy.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        entropy = F.cross_entropy(logits, labels, reduction="none")
        # for gamma < 1 the slope of the power is infinite at p_y = 1
        missing = (-torch.expm1(-entropy)).clamp(min=torch.finfo(entropy.dtype).tiny)
        return (missing**gamma * entropy).mean()

    return loss


def ldam(counts: Tensor, *, max_margin: float, scale: float) -> Loss:
    """CE(z - scale * m_y at y, y), m_k = max_margin * (n_k / min n)^(-1/4): rare classes must win by more (arXiv 1906.07413).

    Args:
        max_margin: margin of the rarest class, in cosines.
        scale: scale of the head that made the logits. Only the margin is multiplied by it: the logits already are.
    """
    margins = scale * max_margin * (counts / counts.min()) ** -0.25

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        true = labels.unsqueeze(1)
        return F.cross_entropy(logits.scatter_add(1, true, -margins[true].to(logits.dtype)), labels)

    return loss


def class_balanced(counts: Tensor, *, beta: float) -> Loss:
    """Cross-entropy with class weights (1 - beta) / (1 - beta^n_k), one over the effective number (arXiv 1901.05555).

    The mean is weighted, sum w_y CE / sum w_y over the batch, so that only the ratios of the weights count.

    Args:
        beta: in [0, 1): 0 is plain cross-entropy, and towards 1 it becomes `reweighted`.
    """
    exact = counts.to(counting_device(counts.device)).double()
    return _weighted(1 / (1 - beta**exact), counts.device)


def reweighted(counts: Tensor) -> Loss:
    """Cross-entropy with class weights 1 / prior, GRW of LIFT (arXiv 2309.10019); the mean is that of `class_balanced`."""
    return _weighted(1 / counts, counts.device)


def _weighted(weights: Tensor, device: torch.device) -> Loss:
    weights = (weights / weights.mean()).float().to(device)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, weight=weights.to(logits.dtype))

    return loss


def balanced_softmax(counts: Tensor, *, label_smoothing: float = 0.0) -> Loss:
    """CE(z + log n, y) (arXiv 2007.10740), which is logit adjustment with tau 1: softmax knows no common shift."""
    return logit_adjusted(counts, tau=1.0, label_smoothing=label_smoothing)


def logit_adjusted(counts: Tensor, *, tau: float, label_smoothing: float = 0.0) -> Loss:
    """CE(z + tau * log prior, y), prior = n / sum n: rare classes must win by a margin while training (arXiv 2007.07314).

    Args:
        tau: strength; 0 is plain cross-entropy.
        label_smoothing: as in `cross_entropy`.
    """
    return _shifted(tau * _log_prior(counts), label_smoothing)


def gla(counts: Tensor, *, log_q: Tensor) -> Loss:
    """CE(z + log prior + log q, y): the tuned logits contain neither prior (arXiv 2310.08106; in training by assumption).

    Args:
        log_q: (K,), log of the label prior inside the foundation model (methods.prior).
    """
    return _shifted(_log_prior(counts) + log_q.to(counts.device))


def _shifted(shift: Tensor, label_smoothing: float = 0.0) -> Loss:
    return lambda logits, labels: F.cross_entropy(logits + shift, labels, label_smoothing=label_smoothing)


def lade(counts: Tensor, *, remine: float, weight: float) -> Loss:
    """CE(z + log prior, y) + weight * sum_k prior_k (r_k + remine * r_k^2 - a_k): LADE (arXiv 2012.00321).

    a_k is the mean of z_k over the images of class k in the batch, 0 without any, and r_k = log mean_B exp(z_k - log(K
    prior_k)) over the whole batch: the logits shall be those of uniform classes by themselves. The reference figures
    correct z_k by the prior of class k, not by that of the image's own class.

    Args:
        remine: strength of the penalty that keeps r_k near 0.
        weight: strength of the whole second term; 0 is `balanced_softmax`.
    """
    log_prior, num_classes = _log_prior(counts), len(counts)
    prior, shift = log_prior.exp(), log_prior + math.log(num_classes)
    classes = torch.arange(num_classes, device=counts.device)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        own = labels.unsqueeze(1) == classes
        attained = (logits * own).sum(0) / own.sum(0).clamp(min=1)
        normaliser = (logits - shift).logsumexp(0) - math.log(len(logits))
        estimate = prior * (normaliser + remine * normaliser**2 - attained)
        return F.cross_entropy(logits + log_prior, labels) + weight * estimate.sum()

    return loss


def _log_prior(counts: Tensor) -> Tensor:
    return (counts / counts.sum()).log()
