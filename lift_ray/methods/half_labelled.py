"""The objective of a training step: LIFT's loss on labeled images, and methods that also learn from unlabeled images.

FixMatch (arXiv 2001.07685), LoFT (arXiv 2509.09926) and ULFine (our reading of arXiv 2505.05062). Every unlabeled image
has two views: the model's prediction for the weak view is the target for the strong view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lift_ray.methods.lift import Lift
from lift_ray.methods.ulfine import FusedHead, orthogonality
from lift_ray.model.losses import Loss, logit_adjusted

if TYPE_CHECKING:
    from lift_ray.methods.world import Ranks


class Objective(Protocol):
    """The loss of a rank's part of a step.

    Attributes:
        forward: computes the objective's first argument from images and patches.
        pseudo_labels: (3, K) of this epoch so far, over all ranks: images of each class, images whose confident
            pseudo-label is the class, and how many of those are right; None for a method without pseudo-labels.
    """

    forward: Callable[..., Tensor]
    pseudo_labels: Tensor | None

    def __call__(self, output: Tensor, labels: Tensor, /) -> tuple[Tensor, Tensor]:
        """Loss, and accuracy on the labeled images, from the output of `forward` for B images and their labels."""


class Labelled:
    """LIFT: the loss of the run on labeled images (arXiv 2309.10019)."""

    forward: Callable[..., Tensor]
    pseudo_labels: Tensor | None = None

    def __init__(self, model: Lift, loss: Loss, ranks: Ranks) -> None:
        self.forward, self.loss = model, loss

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Raw logits (B, K) and labels (B,)."""
        return self.loss(logits, labels), hits(logits, labels)


class Consistent:
    """FixMatch on the loss of the run: L(z, y) + consistency(z(weak), z(strong)); LoFT is the same with other weights.

    A micro-batch holds B labeled images, then weak views of ratio * B unlabeled images, then strong views of the same images.

    Args:
        model: of which features are taken, so that one pass through the tower serves all logits.
        loss: on the labeled images.
        ratio: unlabeled images per labeled image.
        sure, unsure: weights of images whose confidence reaches the threshold, and of the rest.
    """

    def __init__(
        self, model: Lift, loss: Loss, ranks: Ranks, *, threshold: float, ratio: int, sure: float, unsure: float = 0.0
    ) -> None:
        self.model, self.loss, self.ranks = model, loss, ranks
        self.forward: Callable[..., Tensor] = model.feature
        self.threshold, self.ratio, self.sure, self.unsure = threshold, ratio, sure, unsure
        self.pseudo_labels: Tensor | None = None

    def __call__(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B + 2 ratio B, D) and a label for each; labels of unlabeled images are only counted."""
        parts = self.parts(len(labels))
        logits, weak, strong = self.model.classify(features).split(parts)
        labelled, true, _ = labels.split(parts)
        teacher = weak.detach().softmax(1)
        self.count(teacher, true)
        loss = self.loss(logits, labelled) + consistency(teacher, strong, self.threshold, self.sure, self.unsure)
        return loss, hits(logits, labelled)

    def parts(self, size: int) -> list[int]:
        """Numbers of labeled images, weak views and strong views in a batch."""
        labelled = size // (1 + 2 * self.ratio)
        return [labelled, self.ratio * labelled, self.ratio * labelled]

    def count(self, teacher: Tensor, true: Tensor) -> Tensor:
        """Count the pseudo-labels of all ranks; returns those of this step, (3, K) as `Objective.pseudo_labels`."""
        num_classes, (confidence, guess) = teacher.shape[1], teacher.max(1)
        own = F.one_hot(true, num_classes)
        given = F.one_hot(guess, num_classes) * (confidence >= self.threshold).unsqueeze(1)
        found = torch.stack([own.sum(0), given.sum(0), (own * given).sum(0)])
        self.ranks.sum(found)
        self.pseudo_labels = found if self.pseudo_labels is None else self.pseudo_labels + found
        return found


class UlfineObjective(Consistent):
    """ULFine (our reading): L(Z, y) + lambda_s * CE(S + similarity_tau * log prior, y) + the mean of both logits' consistency with
    F(weak) + lambda_o * orthogonality.

    The fused logits F make the pseudo-labels; the prototypes of a step's similarity logits S are those that the step began with,
    and those fitted in it are held orthogonal, with a gradient through the class means of its labelled features. All of this
    loss is assumed.

    Args:
        similarity_loss: on the similarity logits of labeled images.
        lambda_s, lambda_o: weights of that loss and of the orthogonality.
    """

    def __init__(
        self,
        model: Lift,
        loss: Loss,
        ranks: Ranks,
        *,
        similarity_loss: Loss,
        lambda_s: float,
        lambda_o: float,
        **options: Any,
    ) -> None:
        super().__init__(model, loss, ranks, **options)
        self.similarity_loss, self.lambda_s, self.lambda_o = similarity_loss, lambda_s, lambda_o

    def __call__(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy from features (B + 2 ratio B, D) and a label for each image; unlabeled labels are only counted."""
        parts, features, head = self.parts(len(labels)), features.float(), self.model.head
        assert isinstance(head, FusedHead)
        (linear, weak_z, strong_z), (similarity, weak_s, strong_s) = (z.split(parts) for z in head.both(features))
        labelled, true, _ = labels.split(parts)
        teacher = head.fused(weak_z, weak_s).detach().softmax(1)
        pseudo_labels = self.count(teacher, true)[1]
        agree = [
            consistency(teacher, strong, self.threshold, self.sure, self.unsure) for strong in (strong_z, strong_s)
        ]
        fitted = head.fit(*self.class_sums(features[: len(labelled)], labelled, len(pseudo_labels)), pseudo_labels)
        loss = self.loss(linear, labelled) + self.lambda_s * self.similarity_loss(similarity, labelled)
        return loss + (agree[0] + agree[1]) / 2 + self.lambda_o * orthogonality(fitted), hits(
            head.fused(linear, similarity), labelled
        )

    def class_sums(self, features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """(K, D) unit features summed by class, and (K,) how many, over all ranks.

        Each rank has the gradient of its own features only, `world_size` times, for the ranks' gradients are averaged.
        """
        own = F.one_hot(labels, num_classes).float()
        sums = own.T @ F.normalize(features, dim=-1)
        everyone = self.ranks.sum(torch.cat([sums.detach(), own.sum(0).unsqueeze(1)], 1))
        return everyone[:, :-1] + self.ranks.world_size * (sums - sums.detach()), everyone[:, -1]


def consistency(teacher: Tensor, strong: Tensor, threshold: float, sure: float, unsure: float = 0.0) -> Tensor:
    """mean(sure 1[max p >= threshold] CE(z, argmax p) + unsure 1[max p < threshold] CE(z, p)), over all B images.

    Args:
        teacher: (B, K) probabilities p from the weak views, without a gradient.
        strong: (B, K) logits z of the strong views.
    """
    confidence, guess = teacher.max(1)
    hard = F.cross_entropy(strong, guess, reduction="none")
    soft = F.cross_entropy(strong, teacher, reduction="none")
    return torch.where(confidence >= threshold, sure * hard, unsure * soft).mean()


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Fraction of a batch whose largest logit is at its label."""
    return (logits.detach().argmax(1) == labels).float().mean()


# What builds the objective of each method (registry.METHODS), from its settings, the training images of each class (K,), and from
# the model, the loss on labelled images and the ranks.


def lift(method: Any, counts: Tensor, *parts: Any) -> Objective:
    """The objective of LIFT."""
    return Labelled(*parts)


def fixmatch(method: Any, counts: Tensor, *parts: Any) -> Objective:
    """The objective of FixMatch."""
    return Consistent(*parts, threshold=method.threshold, ratio=method.unlabelled_ratio, sure=method.lambda_u)


def loft(method: Any, counts: Tensor, *parts: Any) -> Objective:
    """The objective of LoFT."""
    return Consistent(
        *parts, threshold=method.threshold, ratio=method.unlabelled_ratio, sure=method.lambda_1, unsure=method.lambda_2
    )


def ulfine(method: Any, counts: Tensor, *parts: Any) -> Objective:
    """The objective of ULFine."""
    return UlfineObjective(
        *parts,
        threshold=method.threshold,
        ratio=method.unlabelled_ratio,
        sure=method.lambda_u,
        similarity_loss=logit_adjusted(counts, tau=method.similarity_tau),
        lambda_s=method.lambda_s,
        lambda_o=method.lambda_o,
    )
