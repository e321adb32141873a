"""The classifier whose weights are text embeddings of the classes, computed in every step of training by a text side that learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lift_ray.errors import BadInput
from lift_ray.model.backbone import Backbone, Template, Texts, spoken, templates_of
from lift_ray.model.heads import ZeroShotHead
from lift_ray.model.text_tower import TextTower
from lift_ray.model.tuners.base import BlockTuner, Tuner, first_block, with_own_weights

CHUNK = 1024  # texts that go through the tower at a time
PROJECTIONS = ("projection", "projection_bias")  # of the text tower
LEAST_TOKENS = 4  # start, a name of two tokens and end


@dataclass(frozen=True)
class Lines:
    """The texts of all classes as tokens.

    Attributes:
        ids: (N, T), zeros in the places of learned context.
        owner: (N,), the class of each text.
        num_classes: K.
        start: position of the first token of the context.
    """

    ids: Tensor
    owner: Tensor
    num_classes: int
    start: int


@dataclass(frozen=True)
class Kept:
    """Text embeddings, (K, E), and the trained parameters that gave them.

    The values are compared, because torch does not count the changes that its fused optimizers make.
    """

    parameters: list[Tensor]
    text: Tensor

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Return True if these parameters give the same embeddings."""
        pairs = zip(self.parameters, parameters, strict=True)
        return all(kept.device == now.device and torch.equal(kept, now) for kept, now in pairs)


class TextHead(nn.Module):
    """z_k = scale * cos(f @ projection, t_k), t_k the text embedding of class k (arXiv 2103.00020).

    t_k is the mean of the normalized embeddings of the class's texts, normalized again. The learned context (CoOp, arXiv
    2109.01134), the tuners of the text tower and both projections are trained, each if it is given. In training the texts go
    through the text tower in every step, from the first block that is tuned on, or from the start if there is learned context;
    without gradients they do so only after a parameter has changed.

    All heads of a process share the frozen text tower, as the models share the image tower.

    Args:
        tower: of the texts.
        parts: options of its tuners, as in `methods.lift.Lift`; empty for none.
        lines: texts of the classes.
        projection: (D, E), from image features to the shared space.
        scale: factor of the cosines.
        bias: (E,), added to the projected features; it is not trained. None for none.
        context: (M, W), the start of the learned context; None without.
        projections: train both projections.
        dtype: of the products in the text tower, by autocast.
    """

    ids: Tensor
    owner: Tensor
    at: Tensor
    bias: Tensor | None

    def __init__(
        self,
        tower: TextTower,
        parts: dict[str, dict[str, Any]],
        lines: Lines,
        projection: Tensor,
        scale: float,
        *,
        bias: Tensor | None = None,
        context: Tensor | None = None,
        projections: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        own = [name for name in PROJECTIONS if getattr(tower, name) is not None] if projections else []
        self.tower = with_own_weights(tower, parts, own)
        self.tuner = Tuner(parts, tower)
        if any(
            type(tuner).tokens is not BlockTuner.tokens for tuner in self.tuner.per_block
        ):  # the pooled token would move
            raise BadInput("head.tuner", "must not add tokens to texts", " and ".join(parts), "use head.context")
        self.context = None if context is None else nn.Parameter(context.detach().clone().float())
        start = projection.detach().clone().float()
        if projections:
            self.projection: Tensor = nn.Parameter(start)
        else:
            self.register_buffer("projection", start, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().clone().float(), persistent=False)
        self.scale, self.dtype, self.start, self.num_classes = scale, dtype, lines.start, lines.num_classes
        at = tower.pooled_at(lines.ids)
        self.register_buffer("at", at, persistent=False)
        self.register_buffer("ids", lines.ids[:, : tower.needed(at)], persistent=False)
        self.register_buffer("owner", lines.owner, persistent=False)
        tuned = [first_block(kind, options, tower.num_blocks) for kind, options in parts.items()]
        self.first_tuned = 0 if context is not None else min(tuned, default=tower.num_blocks)
        self._frozen: Tensor | None = None
        shared = {id(p) for p in tower.parameters()}
        self._own = [p for p in self.parameters() if id(p) not in shared]
        self._kept: Kept | None = None

    def forward(self, feature: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        shared = feature @ self.projection if self.bias is None else feature @ self.projection + self.bias
        return self.scale * F.normalize(shared, dim=-1) @ self.text().T

    def text(self) -> Tensor:
        """Normalized text embeddings of the classes, (K, E): computed anew for a gradient, else once for the parameters as they are."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            return self._embeddings()
        if self._kept is None or not self._kept.is_of(self._own):
            with torch.inference_mode(False), torch.no_grad():  # usable outside of inference too
                self._kept = Kept([p.detach().clone() for p in self._own], self._embeddings())
        return self._kept.text

    def constant(self) -> ZeroShotHead:
        """The same classifier without its text side."""
        with torch.no_grad():
            return ZeroShotHead(self.projection, self.text(), self.scale, self.bias)

    def _embeddings(self) -> Tensor:
        with torch.autocast(self.ids.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            rows = torch.cat([self._rows(slice(at, at + CHUNK)) for at in range(0, len(self.ids), CHUNK)])
        rows = F.normalize(rows.float(), dim=-1)
        if len(rows) == self.num_classes:
            return rows
        return F.normalize(rows.new_zeros(self.num_classes, rows.shape[1]).index_add(0, self.owner, rows), dim=-1)

    def _rows(self, part: slice) -> Tensor:
        """Embeddings of some texts, (n, E)."""
        tower, at = self.tower, self.at[part]
        if not self.first_tuned:
            x = tower.embed(self.ids[part], self.context, self.start)
        else:
            x = self._below_tuned()[part]
            if self.first_tuned == tower.num_blocks:
                return tower.project(x)
        x = tower.blocks_until(x, tower.num_blocks, self.first_tuned, self.tuner.per_block)
        return tower.project(tower.pooled(x, at))

    def _below_tuned(self) -> Tensor:
        """Activations of all texts after the blocks below the first tuned one, (N, T, W), or (N, W) after all blocks; computed once."""
        if self._frozen is None or self._frozen.device != self.ids.device:
            with torch.inference_mode(False), torch.no_grad():
                self._frozen = torch.cat([self._frozen_rows(part) for part in torch.arange(len(self.ids)).split(CHUNK)])
        return self._frozen

    def _frozen_rows(self, part: Tensor) -> Tensor:
        x = self.tower.blocks_until(self.tower.embed(self.ids[part]), self.first_tuned)
        return self.tower.pooled(x, self.at[part]) if self.first_tuned == self.tower.num_blocks else x


def build(backbone: Backbone, class_names: Sequence[str], head: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The classifier by texts of resolved settings; `ZeroShotHead` if its text side is not trained.

    Args:
        head: settings.heads.TextHeadConfig.
        dtype: of the products in the text tower.

    Raises BadInput if the text tower does not allow the settings.
    """
    if backbone.text is None or backbone.projection is None:
        remedy = "use head.kind=cosine with head.init=class_mean"
        raise BadInput("head.kind text", "requires a text tower", but=f"{backbone.name} has none", remedy=remedy)
    if not head.trains:
        return backbone.zero_shot_head(class_names, head.template, head.texts, head.scale)
    tower = backbone.text_tower
    most = tower.length - LEAST_TOKENS
    if head.context > most:
        rule = f"must be at most {most}, because the text tower of {backbone.name} reads {tower.length} tokens"
        raise BadInput("head.context", rule, head.context, "lower it")
    texts = texts_of(class_names, head.template, head.texts, with_context=head.context > 0)
    return TextHead(
        tower,
        {} if head.tuner is None else {head.tuner.kind: head.tuner.options(tower.num_blocks)},
        tokenized(backbone, texts, head.context),
        backbone.projection,
        backbone.logit_scale if head.scale is None else head.scale,
        bias=backbone.projection_bias,
        context=first_context(backbone, head.template, head.context) if head.context else None,
        projections=head.projections,
        dtype=dtype,
    )


def texts_of(
    class_names: Sequence[str], template: Template, texts: Texts | None, with_context: bool = False
) -> list[list[str]]:
    """The texts of each class: its own in `texts`, or a name in each template.

    Args:
        with_context: leave out the template's words before the name, where the learned context goes.
    """
    around = templates_of("{}" + _one(template).partition("{}")[2] if with_context else template)
    return [
        list(texts[key]) if texts and key in texts else [line(name) for line in around]
        for key, name in zip(class_names, spoken(class_names), strict=True)
    ]


def _one(template: Template) -> str:
    return template if isinstance(template, str) else template[0]


def tokenized(backbone: Backbone, texts: Sequence[Sequence[str]], context: int = 0) -> Lines:
    """The texts of each class as tokens, with `context` free places after the token that starts a text."""
    assert backbone.tokenizer is not None
    lines = [line for of_class in texts for line in of_class]
    ids, start = backbone.tokenizer(lines, backbone.text_tower.length - context), _start(backbone)
    if context:
        ids = torch.cat([ids[:, :start], ids.new_zeros(len(ids), context), ids[:, start:]], dim=1)
    owner = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(of_class) for of_class in texts]))
    return Lines(ids, owner, len(texts), start)


def first_context(backbone: Backbone, template: Template, number: int) -> Tensor:
    """The start of a context, (M, W): the template's words before the name if they are M tokens, else N(0, 0.02), as in CoOp."""
    tower, start = backbone.text_tower, _start(backbone)
    assert backbone.tokenizer is not None
    ids = backbone.tokenizer([_one(template).partition("{}")[0].strip()], tower.length)
    stop = int(tower.pooled_at(ids)[0])
    if tower.pool in ("argmax", "eos") and stop - start == number:
        return tower.tokens.weight[ids[0, start:stop].to(tower.tokens.weight.device)]
    return 0.02 * torch.randn(number, tower.width)


def _start(backbone: Backbone) -> int:
    """Number of tokens that the tokenizer puts before every text: 1 for CLIP's, 0 for those without a start token."""
    assert backbone.tokenizer is not None
    one, other = backbone.tokenizer(["a", "b"], backbone.text_tower.length)[:, 0].tolist()
    return int(one == other)
