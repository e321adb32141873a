"""The label prior that a foundation model carries from its pre-training, and logits without it: GLA (arXiv 2310.08106)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lift_ray.epoch_metrics import GROUPS

MOST_ROUNDS = 500
TOLERANCE = 1e-4
LONGEST_STEP = 20.0  # of log q in a round, where a class gets no mass at all
LEAST_SKILL = 1e-3  # 1 / T in units of 1 / the logits' deviation, under which they say nothing of the labels
ROWS = 4096  # of logits that are worked on at a time

Sum = Callable[[Tensor], Tensor]


class Prior(NamedTuple):
    """Result of `fit`.

    Args:
        log_q: (K,), log of the label prior inside the model, sum of q = 1.
        temperature: what the logits are divided by to be calibrated.
    """

    log_q: Tensor
    temperature: float


def fit(logits: Tensor, labels: Tensor, *, calibrate: bool = True, reduce: Sum = lambda tensor: tensor) -> Prior:
    """Return the q that minimizes CE(z / T - log q + log r, y), r the class frequencies of this set (arXiv 2310.08106).

    GLA assumes a balanced set, where log r is the same for all classes and drops out; for any other set, its own prior is
    removed here. With b = log r - log q the problem is convex: b <- b + log(r / mean_x softmax(z / T + b)) until the mean
    predicted mass is r, and in turn a Newton step on 1 / T.

    Images required, from priors planted in synthetic logits (tests/test_prior.py): L1 <= 0.1 needs about 40 of each class for
    K = 50, and 5 of each for K = 365 and 1000; with 5 of each for K = 50, and 1 for the others, L1 is 0.12 to 0.2.

    Args:
        logits: z (n, K) of a model that was not trained on the data, on held-out images; with several ranks, those of this rank.
        labels: y (n,).
        calibrate: fit T too. The paper requires calibrated models and does not say how; here T is fitted jointly, by cross-entropy.
        reduce: sums a tensor over the ranks.

    Raises ValueError if classes have no image, naming them; if the logits are not finite or not informative (T would be
    infinite); if the fit does not converge.
    """
    num_classes = logits.shape[1]
    counts = reduce(torch.bincount(labels, minlength=num_classes).double())
    if empty := (counts == 0).nonzero().flatten().tolist():
        raise ValueError(f"every class needs an image, but there is none of class {', '.join(map(str, empty[:4]))}")
    num_images = float(counts.sum())
    log_r = (counts / num_images).log()
    mean = reduce(logits.double().sum(0)) / num_images  # without it, b and T would pull at the same thing
    centered = [part.float() - mean.float() for part in logits.split(ROWS)]
    own = mean.new_zeros(2)  # sums of the logits of the images' own classes, and of all squares
    for part, y in zip(centered, labels.split(ROWS), strict=True):
        own[0] += part.gather(1, y.unsqueeze(1)).double().sum()
        own[1] += part.double().square().sum()
    found, square = reduce(own).tolist()
    spread = math.sqrt(square / (num_images * num_classes))
    if not math.isfinite(spread) or spread == 0:
        raise ValueError(f"the model's logits must be finite and differ, but their deviation is {spread:g}")
    b, inverse = log_r.clone(), 1 / spread if calibrate else 1.0
    for _ in range(MOST_ROUNDS):
        sums = reduce(_moments(centered, b, inverse))
        step = (log_r - (sums[:-2] / num_images).log()).clamp(-LONGEST_STEP, LONGEST_STEP)
        b = b + step
        change = float(step.abs().max())
        if calibrate:
            expected, variance = sums[-2:].tolist()
            wanted = inverse - (expected - found) / max(variance, 1e-12)
            wanted = min(max(wanted, inverse / 2), inverse * 2)
            change, inverse = max(change, abs(math.log(wanted / inverse))), wanted
            if inverse * spread < LEAST_SKILL:
                raise ValueError(
                    "the model's logits must say something of the labels, but no temperature makes them do"
                )
        if change < TOLERANCE:
            log_q = log_r - b + inverse * mean
            return Prior((log_q - log_q.logsumexp(0)).float(), 1 / inverse)
    raise ValueError(f"the label prior must settle, but it still changed by {change:.2g} after {MOST_ROUNDS} rounds")


def _moments(centered: Sequence[Tensor], b: Tensor, inverse: float) -> Tensor:
    """Return sums over the images, (K + 2,): predicted mass of each class; mean and variance of z under softmax(z / T + b)."""
    sums = b.new_zeros(len(b) + 2)
    for part in centered:
        p = (part * inverse + b.float()).softmax(1)
        first = (p * part).sum(1).double()
        sums[:-2] += p.double().sum(0)
        sums[-2] += first.sum()
        sums[-1] += ((p * part * part).sum(1).double() - first**2).sum()
    return sums


def thirds(log_q: Tensor) -> NDArray[np.str_]:
    """many, medium or few for each class, (K,): thirds of the classes by label prior, the larger ones first.

    arXiv 2501.15955 names such groups of the pre-training data, and not where they end; thirds are assumed.
    """
    order = log_q.cpu().numpy().argsort(kind="stable")[::-1]
    groups = np.empty(len(order), dtype="<U6")
    for name, classes in zip(GROUPS, np.array_split(order, 3), strict=True):
        groups[classes] = name
    return groups


def mean_prior(priors: Sequence[Tensor]) -> Tensor:
    """(K,) log of the normalised geometric mean of several label priors, as a mean of logits sees them."""
    log_q = torch.stack(list(priors)).mean(0)
    return log_q - log_q.logsumexp(0)


def gla(tuned: Tensor, zero_shot: Tensor, log_prior: Tensor, log_q: Tensor) -> Tensor:
    """z_ft + z_zs - log prior_train - log q, (B, K) (arXiv 2310.08106).

    Args:
        tuned, zero_shot: calibrated logits (B, K).
        log_prior: (K,), what the training data left in the tuned logits: 0 where the loss took it out.
        log_q: (K,), `fit` of the zero-shot logits.
    """
    return tuned + zero_shot - log_prior - log_q
