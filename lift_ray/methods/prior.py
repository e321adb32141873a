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
RIDGE = 0.01  # 1 / variance of a Gaussian prior on b - log r and on 1 / T in deviations of the logits: a deviation of 10 costs 1/2
LEAST_SKILL = 1e-3  # 1 / T in units of 1 / the logits' deviation, under which they say nothing of the labels
PART = 2**22  # logits that are worked on at a time
RESAMPLES, RESAMPLED_TOLERANCE = 20, 0.01

Sum = Callable[[Tensor], Tensor]


class Prior(NamedTuple):
    """Result of `fit`.

    Args:
        log_q: (K,), log of the label prior inside the model, sum of q = 1.
        temperature: what the logits are divided by to be calibrated.
    """

    log_q: Tensor
    temperature: float


def fit(
    logits: Tensor,
    labels: Tensor,
    *,
    calibrate: bool = True,
    reduce: Sum = lambda tensor: tensor,
    weights: Tensor | None = None,
    start: Prior | None = None,
    tolerance: float = 1e-4,
) -> Prior:
    """Return the q that minimizes CE(z / T - log q + log r, y), r the class frequencies of this set (arXiv 2310.08106).

    GLA assumes a balanced set, where log r is the same for all classes and drops out; for any other set, its own prior is
    removed here. The problem is convex in b = log r - log q and 1 / T. L-BFGS solves it, with a small ridge, so that
    separable classes have a solution too. docs/concepts/ensembles.md says how many images that takes, and how exact q is.

    Args:
        logits: z (n, K) of a model that was not trained on the data, on held-out images; with several ranks, those of this rank.
        labels: y (n,).
        calibrate: fit T too. The paper requires calibrated models and does not say how; here T is fitted jointly, by cross-entropy.
        reduce: sums a tensor over the ranks.
        weights: (n,), how often each image counts; once by default.
        start: where to begin, for example at the result without weights.
        tolerance: of the predicted mass of a class, relative to its frequency.

    Raises ValueError if classes have no image, naming them; if the logits are not finite or not informative (T would be
    infinite); if the fit does not converge.
    """
    problem = _Problem(logits, labels, torch.ones_like(labels) if weights is None else weights, reduce)
    x = problem.start(start, calibrate)

    @torch.no_grad()
    def gradient() -> float:
        loss, x.grad = problem.loss(x, calibrate)
        return loss

    least = problem.r.min().sqrt()
    torch.optim.LBFGS(
        [x],
        max_iter=MOST_ROUNDS,
        tolerance_grad=tolerance * float(least) / 2,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    ).step(gradient)
    gradient()
    assert x.grad is not None
    if (change := float((x.grad[:-1] / problem.r.sqrt()).abs().max())) >= tolerance:
        raise ValueError(f"the label prior must settle, but a class is still off by {change:.2g} of its frequency")
    if calibrate and float(x[-1]) < LEAST_SKILL:
        raise ValueError("the model's logits must say something of the labels, but no temperature makes them do")
    return problem.prior(x)


class _Problem:
    """Cross-entropy of z / T + b over the images of all ranks, as a function of x = ((b - log r) sqrt(r), spread / T), (K + 1,).

    In these units all second derivatives are about 1. z is centered; else b and T would pull at the same thing.

    Args as of `fit`.

    Attributes:
        r: (K,), class frequencies.
    """

    def __init__(self, logits: Tensor, labels: Tensor, weights: Tensor, reduce: Sum) -> None:
        num_classes = logits.shape[1]
        self.reduce, size = reduce, max(1, PART // num_classes)
        counts = reduce(torch.bincount(labels, weights.double(), minlength=num_classes))
        if empty := (counts == 0).nonzero().flatten().tolist():
            raise ValueError(f"every class needs an image, but there is none of class {', '.join(map(str, empty[:4]))}")
        self.total = float(counts.sum())
        self.r = counts / self.total
        self.mean = reduce(weights.double() @ logits.double()) / self.total
        self.parts = [
            (part.float() - self.mean.float(), w.double())
            for part, w in zip(logits.split(size), weights.split(size), strict=True)
        ]
        sums = self.mean.new_zeros(2)  # of the logits of the images' own classes, and of all squares
        for (part, w), y in zip(self.parts, labels.split(size), strict=True):
            sums[0] += w @ part.gather(1, y.unsqueeze(1)).squeeze(1).double()
            sums[1] += w @ part.double().square().sum(1)
        self.own, square = (reduce(sums) / self.total).tolist()
        self.spread = math.sqrt(square / num_classes)
        if not math.isfinite(self.spread) or self.spread == 0:
            raise ValueError(f"the model's logits must be finite and differ, but their deviation is {self.spread:g}")

    def start(self, prior: Prior | None, calibrate: bool) -> Tensor:
        """Return the x of a prior; without one, that of the mean logits at T = 1 deviation, or at T = 1 if it is not fitted."""
        x = self.r.new_zeros(len(self.r) + 1)
        x[-1] = 1 if calibrate else self.spread
        if prior is not None:
            x[-1] = self.spread / prior.temperature
            x[:-1] = (self.mean / prior.temperature - prior.log_q) * self.r.sqrt()
        return x

    def prior(self, x: Tensor) -> Prior:
        """Return the prior at x."""
        temperature = self.spread / float(x[-1])
        log_q = self.mean / temperature - x[:-1] / self.r.sqrt()
        return Prior((log_q - log_q.logsumexp(0)).float(), temperature)

    def loss(self, x: Tensor, calibrate: bool) -> tuple[float, Tensor]:
        """Return the loss with its ridge, and the gradient, (K + 1,), whose last entry is 0 if T is fixed."""
        shift, inverse = x[:-1] / self.r.sqrt(), x[-1] / self.spread
        b, sums = self.r.log() + shift, x.new_zeros(len(x) + 1)
        for part, w in self.parts:
            z = part.double()
            scaled = torch.addcmul(b, z, inverse)
            largest = scaled.amax(1, keepdim=True)
            e = scaled.sub_(largest).exp_()
            total = e.sum(1)
            sums[:-2] += (w / total) @ e
            sums[-2] += (w / total) @ e.mul_(z).sum(1)
            sums[-1] += w @ (total.log() + largest.squeeze(1))
        sums = self.reduce(sums) / self.total
        ridge = RIDGE / self.total
        gradient = torch.cat(
            [(sums[:-2] - self.r + ridge * shift) / self.r.sqrt(), (sums[-2:-1] - self.own) / self.spread]
        )
        gradient[-1] = gradient[-1] + ridge * x[-1] if calibrate else 0
        penalty = float(shift.square().sum() + x[-1].square())
        return float(sums[-1] - self.r @ b - inverse * self.own) + ridge * penalty / 2, gradient


def resampled(logits: Tensor, labels: Tensor, prior: Prior, times: int = RESAMPLES) -> Tensor:
    """Return log q of sets of resampled images, (times, K): the spread of each column is the standard error of log q.

    The weights of the images are exponential (the Bayesian bootstrap), so that no class loses all its images. They are the same
    for every model with the same images.

    Args as of `fit`, whose result is `prior`. Raises ValueError as `fit`.
    """
    random = torch.Generator().manual_seed(0)
    weights = [torch.empty(len(labels)).exponential_(generator=random).to(logits.device) for _ in range(times)]
    return torch.stack(
        [fit(logits, labels, weights=w, start=prior, tolerance=RESAMPLED_TOLERANCE).log_q for w in weights]
    )


def thirds(log_q: Tensor) -> NDArray[np.str_]:
    """many, medium or few for each class, (K,): thirds of the classes by label prior, the larger ones first.

    arXiv 2501.15955 names such groups of the pre-training data, and not where they end; thirds are assumed.
    """
    order = log_q.cpu().numpy().argsort(kind="stable")[::-1]
    groups = np.empty(len(order), dtype="<U6")
    for name, classes in zip(GROUPS, np.array_split(order, 3), strict=True):
        groups[classes] = name
    return groups


def kept(groups: NDArray[np.str_], samples: Tensor) -> NDArray[np.float64]:
    """Return for each class the fraction of resampled priors (n, K) that put it into its group, (K,)."""
    same = np.array([thirds(log_q) == groups for log_q in samples], dtype=np.float64)
    found: NDArray[np.float64] = same.mean(0)
    return found


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
