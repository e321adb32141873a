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
    """The q that minimises CE(z / T - log q + log r, y), r the class frequencies of this set (arXiv 2310.08106).

    GLA wants a balanced set, where log r is the same for all classes and drops out; of any other set its own prior is taken
    out here. With b = log r - log q it is convex: b <- b + log(r / mean_x softmax(z / T + b)) until the mean predicted mass is
    r, and by turns a step of Newton's method on 1 / T.

    How many images it takes, by priors planted in synthetic logits (tests/test_prior.py): L1 <= 0.1 needs about 40 of each class for
    K = 50, and 5 of each for K = 365 and 1000; with 5 of each for K = 50, and 1 for the others, L1 is 0.12 to 0.2.

    Args:
        logits: z (n, K) of a model that was not trained on the data, on held-out images; of this rank alone, where several share.
        labels: y (n,).
        calibrate: fit T too; the paper wants calibrated models and does not say how: jointly, by cross-entropy, is assumed here.
        reduce: sums a tensor over the ranks.

    Raises ValueError when classes have no image, naming them; when the logits are not finite, or without use: T would be infinite;
    when the fit does not settle.
    """
    num_classes = logits.shape[1]
    counts = reduce(torch.bincount(labels, minlength=num_classes).double())
    if empty := (counts == 0).nonzero().flatten().tolist():
        raise ValueError(f"every class needs an image, but there is none of class {', '.join(map(str, empty[:4]))}")
    num_images = float(counts.sum())
    log_r = (counts / num_images).log()
    mean = reduce(logits.double().sum(0)) / num_images  # without it, b and T would pull at the same thing
    centred = [part.float() - mean.float() for part in logits.split(ROWS)]
    own = sum(
        (part.gather(1, y.unsqueeze(1)).double().sum() for part, y in zip(centred, labels.split(ROWS), strict=True)),
        torch.zeros((), dtype=torch.float64, device=logits.device),
    )
    square = sum((part.double().square().sum() for part in centred), torch.zeros_like(own))
    spread = math.sqrt(float(reduce(square)) / (num_images * num_classes))
    if not math.isfinite(spread) or spread == 0:
        raise ValueError(f"the model's logits must be finite and differ, but their deviation is {spread:g}")
    b, inverse = log_r.clone(), 1 / spread if calibrate else 1.0
    for _ in range(MOST_ROUNDS):
        sums = torch.zeros(num_classes + 3, dtype=torch.float64, device=logits.device)
        sums[-1] = own
        for part in centred:
            p = (part * inverse + b.float()).softmax(1)
            first = (p * part).sum(1).double()
            sums[:-3] += p.double().sum(0)
            sums[-3] += first.sum()
            sums[-2] += ((p * part * part).sum(1).double() - first**2).sum()
        sums = reduce(sums)
        expected, variance, found = sums[num_classes:].tolist()
        step = (log_r - (sums[:-3] / num_images).log()).clamp(-LONGEST_STEP, LONGEST_STEP)
        b = b + step
        change = float(step.abs().max())
        if calibrate:
            wanted = inverse - (expected - found) / max(variance, 1e-12)
            wanted = min(max(wanted, inverse / 2), inverse * 2)
            change, inverse = max(change, abs(math.log(wanted / inverse))), wanted
            if inverse * spread < LEAST_SKILL:
                raise ValueError(
                    "the model's logits must say something of the labels, but no temperature makes them do"
                )
        if change < TOLERANCE:
            break
    else:
        raise ValueError(
            f"the label prior must settle, but it still changed by {change:.2g} after {MOST_ROUNDS} rounds"
        )
    log_q = log_r - b + inverse * mean
    return Prior((log_q - log_q.logsumexp(0)).float(), 1 / inverse)


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
