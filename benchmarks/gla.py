"""How exact the label prior of a foundation model is, from priors planted in synthetic logits, and how many steps the fit takes.

The logits are those of overlapping Gaussian classes, exact but for the planted prior. The further the classes are apart, the more often
the model is right, and the fewer images are left that say something of the prior.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from record import record

from lift_ray.methods.prior import fit, kept, resampled, thirds

SEEDS = [1, 2, 3]
CASES = [(50, images, separation) for separation in (0.35, 0.65, 1.1, 1.6) for images in (10, 40, 160)]
CASES += [(365, 5, 0.5), (1000, 5, 0.5)]  # classes, images of each, deviation of the classes' means
OLD_ROUNDS, OLD_TOLERANCE = 500, 1e-4


def planted(
    num_classes: int, images: int, separation: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels and log q."""
    random = torch.Generator().manual_seed(seed)
    means = torch.randn(num_classes, 16, generator=random) * separation
    labels = torch.arange(num_classes).repeat_interleave(images)
    x = means[labels] + torch.randn(len(labels), 16, generator=random)
    log_q = torch.randn(num_classes, generator=random).log_softmax(0)
    return x @ means.T - means.square().sum(1) / 2 + log_q, labels, log_q


def alternating_settles(logits: torch.Tensor, labels: torch.Tensor) -> bool:
    """Does b <- b + log(r / mean softmax(z / T + b)), in turn with a Newton step on 1 / T, settle within 500 rounds?"""
    z = logits.double() - logits.double().mean(0)
    log_r = (torch.bincount(labels).double() / len(labels)).log()
    spread, own = float(z.square().mean().sqrt()), float(z.gather(1, labels[:, None]).sum())
    b, inverse = log_r.clone(), 1 / spread
    for _ in range(OLD_ROUNDS):
        p = (z * inverse + b).softmax(1)
        first = (p * z).sum(1)
        step = (log_r - p.mean(0).log()).clamp(-20, 20)
        variance = float(((p * z * z).sum(1) - first.square()).sum())
        wanted = inverse - (float(first.sum()) - own) / max(variance, 1e-12)
        wanted = min(max(wanted, inverse / 2), inverse * 2)
        change = max(float(step.abs().max()), abs(float(np.log(wanted / inverse))))
        b, inverse = b + step, wanted
        if change < OLD_TOLERANCE:
            return True
    return False


def measured(num_classes: int, images: int, separation: float, seed: int) -> dict[str, float]:
    """Accuracy of the model; L1 of the prior; true and estimated error of log q; classes that keep their group, truly and estimated."""
    logits, labels, log_q = planted(num_classes, images, separation, seed)
    began = time.perf_counter()
    prior = fit(logits, labels)
    took = time.perf_counter() - began
    samples = resampled(logits, labels, prior)
    error = prior.log_q - log_q
    return {
        "accuracy": 100 * float((logits.argmax(1) == labels).double().mean()),
        "l1": float((prior.log_q.exp() - log_q.exp()).abs().sum()),
        "error": float((error - error.mean()).square().mean().sqrt()),
        "estimated error": float((samples - samples.mean(1, keepdim=True)).var(0).mean().sqrt()),
        "right group": 100 * float(np.mean(thirds(prior.log_q) == thirds(log_q))),
        "kept group": 100 * float(kept(thirds(prior.log_q), samples).mean()),
        "seconds": took,
        "alternating settles": float(alternating_settles(logits, labels)),
    }


def main() -> None:
    """Measure and write a row with the means over the seeds."""
    figures: dict[str, Any] = {}
    for num_classes, images, separation in CASES:
        found = [measured(num_classes, images, separation, seed) for seed in SEEDS]
        means = {name: round(float(np.mean([one[name] for one in found])), 3) for name in found[0]}
        figures[f"classes {num_classes}, images {images}, separation {separation}"] = means
        print(num_classes, images, separation, means, flush=True)
    record("gla", "python benchmarks/gla.py", figures, seeds=SEEDS)


if __name__ == "__main__":
    main()
