"""ULFine (our reading): prototypes next to a linear head, fitted to labeled and unlabeled images (arXiv 2505.05062).

The paper's full text and code were not available; what is said to be assumed here is stated by no source.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lift_ray.model.heads import CosineHead


class FusedHead(nn.Module):
    """Dual logit fusion: F = eta S + (1 - eta) Z, of S = scale cos(f, c_k) and Z = scale cos(f, w_k).

    The weights w are trained, the prototypes c are fitted by `fit`. They are buffers, so a checkpoint holds them.

    Args:
        linear: gives Z and the scale.
        text: (K, D), text features of the classes, where the prototypes start.
        mu: how far the prototype of the most frequent pseudo-label moves in a step, in [0, 1]; assumed.
        ema: how much of the visual prototypes stays in a step, in [0, 1); assumed.
        pseudo_ema: how much of the frequency of the pseudo-labels does; assumed.
        eta: fraction of S, in [0, 1]; assumed.
    """

    prototypes: Tensor
    visual: Tensor
    frequency: Tensor

    def __init__(
        self, linear: CosineHead, text: Tensor, *, mu: float, ema: float, pseudo_ema: float, eta: float
    ) -> None:
        super().__init__()
        self.linear, self.mu, self.ema, self.pseudo_ema, self.eta = linear, mu, ema, pseudo_ema, eta
        self.register_buffer("prototypes", text.detach().clone().float())
        self.register_buffer("visual", torch.zeros_like(self.prototypes))
        self.register_buffer("frequency", torch.zeros_like(self.prototypes[:, 0]))

    def forward(self, feature: Tensor) -> Tensor:
        """(B, D) -> (B, K), the fused logits."""
        return self.fused(*self.both(feature))

    def both(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) -> Z and S, (B, K) each."""
        cosines = F.linear(F.normalize(feature, dim=-1), F.normalize(self.prototypes, dim=-1))
        return self.linear(feature), self.linear.scale * cosines

    def fused(self, linear: Tensor, similarity: Tensor) -> Tensor:
        """Z and S -> F."""
        return self.eta * similarity + (1 - self.eta) * linear

    def fit(self, sums: Tensor, counts: Tensor, pseudo_labels: Tensor) -> Tensor:
        """Prototype adaptive fitting of one step: c_k <- (1 - alpha_k) c_k + alpha_k v_k, alpha_k = mu P_k / max_i P_i.

        v_k is a moving average of the means of the labelled unit features of class k, the first of which counts whole; P that of
        the confident pseudo-labels of each step, with a decay of its own, which is assumed. alpha_k is 0 for a class that had no
        pseudo-label yet, or no labeled image.

        Args:
            sums: (K, D), labelled unit features of the step, summed by class over all ranks.
            counts: (K,), how many they are.
            pseudo_labels: (K,), confident pseudo-labels of the step, over all ranks.

        Returns:
            (K, D) the new prototypes, with a gradient to `sums`; what is kept has none.
        """
        seen, before = counts > 0, self.visual.any(1)
        keep = torch.where(seen, self.ema * before, 1.0).unsqueeze(1)
        visual = keep * self.visual + (1 - keep) * sums / counts.clamp(min=1).unsqueeze(1)
        self.frequency.lerp_(pseudo_labels.to(self.frequency), 1 - self.pseudo_ema)
        alpha = self.mu * self.frequency / self.frequency.max().clamp(min=torch.finfo(torch.float32).tiny)
        fitted = self.prototypes.lerp(visual, (alpha * (seen | before)).unsqueeze(1))
        self.visual, self.prototypes = visual.detach(), fitted.detach()
        return fitted


def orthogonality(prototypes: Tensor) -> Tensor:
    """|C C^T - I|^2 / K^2 of the prototypes as unit rows C (K, D): classes shall not share a direction.

    That there is such a term is said of the paper; this norm is assumed, and no setting changes it but its weight.
    """
    unit = F.normalize(prototypes, dim=-1)
    return (unit @ unit.T - torch.eye(len(unit), device=unit.device)).square().mean()
