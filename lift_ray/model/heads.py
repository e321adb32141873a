"""Classifier heads on features, and the weights they start from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN_OF = 100  # images of a class in its mean (arXiv 2309.10019)
CHUNK_VALUES = 1 << 24  # logits of the linear probe that are in memory at a time


class Head(nn.Module):
    """A classifier with trained weights (K, D) on features (B, D); subclasses say how the two meet.

    Args:
        weight: (K, D), the start of the trained weights, for example from the class names; it is copied.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone().float())


class LinearHead(Head):
    """z_k = f . w_k + b_k; the trained bias starts at zero, and neither features nor weights are normalised."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.bias = nn.Parameter(torch.zeros_like(self.weight[:, 0]))

    def forward(self, feature: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        return F.linear(feature, self.weight, self.bias)


class CosineHead(Head):
    """z_k = scale * cos(f, w_k) (arXiv 2309.10019).

    Args:
        weight: as in `Head`.
        scale: 25 in LIFT.
    """

    def __init__(self, weight: Tensor, scale: float = 25.0) -> None:
        super().__init__(weight)
        self.scale = scale

    def forward(self, feature: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        return self.scale * F.linear(F.normalize(feature, dim=-1), F.normalize(self.weight, dim=-1))


class L2NormHead(Head):
    """z_k = f . w_k / |w_k| on the feature as it comes: no scale, no bias (arXiv 2309.10019)."""

    def forward(self, feature: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        return F.linear(feature, F.normalize(self.weight, dim=-1))


class LayerNormHead(Head):
    """z_k = LayerNorm(f) . w_k / |w_k|: no scale, no bias (arXiv 2309.10019).

    The LayerNorm has no trained scale and shift; its epsilon is 1e-12.
    """

    def forward(self, feature: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        normalised = F.layer_norm(feature, feature.shape[-1:], eps=1e-12)
        return F.linear(normalised, F.normalize(self.weight, dim=-1))


class ZeroShotHead(nn.Module):
    """CLIP's own zero-shot classifier: z_k = logit_scale * cos(f @ projection + bias, text_k) (arXiv 2103.00020). Not trained.

    Args:
        projection: (D, E), from features to the shared space.
        text: (K, E), normalised text embeddings of the classes.
        logit_scale: CLIP's 1 / temperature.
        bias: (E,), of the projection; None for none.
    """

    projection: Tensor
    text: Tensor
    bias: Tensor | None

    def __init__(self, projection: Tensor, text: Tensor, logit_scale: float, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("bias", None if bias is None else bias.detach().clone().float())
        self.register_buffer("projection", projection.detach().clone().float())
        self.register_buffer("text", text.detach().clone().float())
        self.logit_scale = logit_scale

    def forward(self, feature: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        return self.logit_scale * F.normalize(self._shared(feature), dim=-1) @ self.text.T

    def _shared(self, feature: Tensor) -> Tensor:
        """(B, D) -> (B, E), features in the space of the texts."""
        return feature @ self.projection if self.bias is None else feature @ self.projection + self.bias


def over_crops(logits: Tensor) -> Tensor:
    """(b, K) as they are, (b, crops, K) to the mean of the crops."""
    return logits.mean(1) if logits.dim() == 3 else logits


def random_weights(num_classes: int, width: int) -> Tensor:
    """(K, D) rows of unit length; every value of a row is uniform in [-1, 1] before it is scaled (arXiv 2309.10019)."""
    return F.normalize(torch.rand(num_classes, width) * 2 - 1, dim=-1)


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """w_k = m_k / |m_k|, m_k the mean feature of class k (arXiv 2309.10019).

    Args:
        features: (N, D), as the tower gives them.
        labels: (N,). Of each class the first 100 images count.

    Returns:
        (K, D) unit rows.

    Raises ValueError naming the classes without images.
    """
    counts = _images_per_class(labels, num_classes)
    order = labels.argsort(stable=True)
    rank = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[order]]
    first = order[rank < MEAN_OF]
    sums = torch.zeros(num_classes, features.shape[1], device=features.device)
    sums.index_add_(0, labels[first], features[first].float())
    return F.normalize(sums, dim=-1)


@torch.no_grad()
def probe_weights(
    features: Tensor, labels: Tensor, num_classes: int, *, penalty: float = 1.0, steps: int = 100
) -> Tensor:
    """w_k = W_k / |W_k|, W of a linear probe: balanced multinomial logistic regression with a bias b (arXiv 2309.10019).

    Minimizes sum_i N / (K n_y) CE(W f_i + b, y_i) + penalty / 2 |W|^2 on the features as they are, by L-BFGS from zero. b is not
    penalized, and it is dropped. The code of LIFT and LIFT+ (trainer.py) does this with scikit-learn, also in double precision:
    LogisticRegression(C=1, class_weight="balanced", max_iter=100), whose C is 1 / penalty. The same input gives the same result.

    Args:
        features: (N, D), as the tower gives them.
        labels: (N,).
        penalty: strength of the L2 penalty.
        steps: L-BFGS steps at most.

    Returns:
        (K, D) unit rows.

    Raises ValueError naming the classes without images.
    """
    num_images, rows = len(labels), max(1, CHUNK_VALUES // num_classes)
    balance = 1 / (num_classes * _images_per_class(labels, num_classes).double())
    chunks = list(zip(features.split(rows), labels.split(rows), balance[labels].split(rows), strict=True))
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.double, device=features.device)
    bias = torch.zeros(num_classes, 1, dtype=torch.double, device=features.device)

    def objective() -> Tensor:
        value = penalty / num_images / 2 * weight.square().sum()
        weight.grad, bias.grad = penalty / num_images * weight, torch.zeros_like(bias)
        for raw, y, share in chunks:
            x = raw.double()
            log_p = torch.addmm(bias.T, x, weight.T).log_softmax(1)
            value = value - share @ log_p.gather(1, y.unsqueeze(1)).squeeze(1)
            error = log_p.exp_().scatter_add_(1, y.unsqueeze(1), -torch.ones_like(share).unsqueeze(1))
            error *= share.unsqueeze(1)
            weight.grad += error.T @ x
            bias.grad += error.sum(0).unsqueeze(1)
        return value

    # 100 steps seldom reach the minimum, so the solver is as scikit-learn's: ten steps of memory, as many evaluations as it needs
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=steps,
        max_eval=20 * steps,
        history_size=10,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    solver.step(objective)
    return F.normalize(weight.detach(), dim=-1).float()


def _images_per_class(labels: Tensor, num_classes: int) -> Tensor:
    counts = labels.bincount(minlength=num_classes)
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        named = ", ".join(map(str, empty[:4])) + (", ..." if len(empty) > 4 else "")
        raise ValueError(
            f"start weights need an image of every class, but there is none of class {named}; use a random start"
        )
    return counts
