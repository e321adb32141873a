"""Frozen text transformers of open_clip, rebuilt with places for tuners and for learned context."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lift_ray.model.blocks import Attention, Block, BlockShape
from lift_ray.model.rebuilt import OPEN_CLIP_BLOCKS, activation_of, rebuilt
from lift_ray.model.tower import SharedWeights
from lift_ray.model.tuners.base import BlockTuner, Identity

NAMES = {
    "positional_embedding": "positions",
    "token_embedding.": "tokens.",
    "ln_final.": "norm_post.",
    "text_projection.weight": "projection",
    "text_projection.bias": "projection_bias",
    "text_projection": "projection",
    **OPEN_CLIP_BLOCKS,
}
"""Names of open_clip and ours."""


class TextTower(SharedWeights):
    """A frozen text transformer: token ids (N, T) -> embeddings (N, E), not normalized.

    If tokens do not look at those after them, the tokens after the last pooled one change nothing and are left out: class
    names have about ten of CLIP's 77.

    Args:
        vocabulary: number of tokens that it knows.
        length: T, the number of tokens that it reads.
        shape: of the blocks, of width W.
        pool: which token is the text: argmax (that with the largest id), eos (the first with `eos_id`), first or last.
        causal: tokens do not look at those after them.
        checkpointing: compute activations again in the backward pass, to save memory.

    Attributes:
        projection: (W, E) to the shared space; None if the texts stay in W dimensions.
        projection_bias: (E,) or None.
    """

    family = "transformer"
    projection: nn.Parameter | None
    projection_bias: nn.Parameter | None

    def __init__(
        self,
        *,
        vocabulary: int,
        length: int,
        shape: BlockShape,
        num_blocks: int,
        pool: str = "argmax",
        eos_id: int = -1,
        causal: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.width, self.num_blocks, self.length = shape, shape.width, num_blocks, length
        self.pool, self.eos_id, self.causal, self.checkpointing = pool, eos_id, causal, checkpointing
        self.tokens = nn.Embedding(vocabulary, self.width)
        self.positions = nn.Parameter(torch.zeros(length, self.width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(num_blocks))
        self.norm_post = shape.norm(self.width)
        self.register_parameter("projection", None)
        self.register_parameter("projection_bias", None)

    def forward(self, ids: Tensor) -> Tensor:
        """(N, T) token ids -> (N, E)."""
        at = self.pooled_at(ids)
        x = self.blocks_until(self.embed(ids[:, : self.needed(at)]), self.num_blocks)
        return self.project(self.pooled(x, at))

    def block_width(self, index: int) -> int:
        """W, of every block."""
        return self.width

    def pooled_at(self, ids: Tensor) -> Tensor:
        """Position of the token that stands for each text: (N, T) -> (N,)."""
        if self.pool == "argmax":
            return ids.argmax(-1)
        if self.pool == "eos":
            return ids.eq(self.eos_id).int().argmax(-1)
        return torch.full_like(ids[:, 0], 0 if self.pool == "first" else ids.shape[1] - 1)

    def needed(self, at: Tensor) -> int:
        """Number of tokens that reach those at positions `at` (N,)."""
        return int(at.max()) + 1 if self.causal else self.length

    def embed(self, ids: Tensor, context: Tensor | None = None, start: int = 1) -> Tensor:
        """Input of the first block, (N, T, W).

        Args:
            ids: (N, T).
            context: (M, W), learned embeddings in place of those of the tokens from `start` on.
        """
        x: Tensor = self.tokens(ids)
        if context is not None:
            x = torch.cat([x[:, :start], context.expand(len(x), -1, -1), x[:, start + len(context) :]], dim=1)
        return x + self.positions[: ids.shape[1]]

    def blocks_until(self, x: Tensor, stop: int, start: int = 0, tuners: Sequence[BlockTuner] | None = None) -> Tensor:
        """The blocks from `start` to `stop`: (N, T, W) -> (N, T, W)."""
        tuners = tuners or [_IDENTITY] * self.num_blocks
        for index in range(start, stop):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.blocks[index], x, tuners[index], use_reentrant=False)
            else:
                x = self.blocks[index](x, tuners[index])
        return x

    def pooled(self, x: Tensor, at: Tensor) -> Tensor:
        """Normed tokens at positions `at` (N,): (N, T, W) -> (N, W)."""
        normed: Tensor = self.norm_post(x[torch.arange(len(x), device=x.device), at])
        return normed

    def project(self, feature: Tensor) -> Tensor:
        """(N, W) -> (N, E)."""
        out = feature if self.projection is None else feature @ self.projection
        return out if self.projection_bias is None else out + self.projection_bias

    def set_mask(self) -> None:
        """Make the blocks causal, if the tower is. The weights must not be on the meta device any more."""
        if self.causal:
            above = torch.full((self.length, self.length), -torch.inf, device=self.positions.device).triu_(1)
            for attention in (m for m in self.modules() if isinstance(m, Attention)):
                attention.mask = above


def rebuild_text(clip: Any) -> TextTower | None:
    """The text tower of a CLIP of open_clip with the same tensors, frozen; None if it is of another make."""
    from open_clip.transformer import ResidualAttentionBlock, TextTransformer

    text = getattr(clip, "text", clip)  # the class CLIP holds the parts of its text tower itself
    if text is not clip and type(text) is not TextTransformer:
        return None
    blocks = getattr(getattr(text, "transformer", None), "resblocks", ())
    pool = getattr(text, "pool_type", getattr(text, "text_pool_type", ""))
    if any(type(block) is not ResidualAttentionBlock for block in blocks) or pool not in POOLS or not blocks:
        return None
    if getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
        return None
    activation = activation_of(blocks[0].mlp.gelu)
    if activation is None:
        return None
    length, width = text.positional_embedding.shape
    with torch.device("meta"):  # as for image towers
        tower = TextTower(
            vocabulary=text.token_embedding.num_embeddings,
            length=length,
            shape=BlockShape(
                width=width,
                num_heads=blocks[0].attn.num_heads,
                hidden=blocks[0].mlp.c_fc.out_features,
                activation=activation,
                norm=partial(nn.LayerNorm, eps=text.ln_final.eps),
            ),
            num_blocks=len(blocks),
            pool=pool,
            eos_id=getattr(text, "eos_id", getattr(text, "text_eos_id", -1)),
            causal=text.attn_mask is not None,
        )
    theirs = {name: value for name, value in text.state_dict().items() if name.startswith(PARTS)}
    state = rebuilt(tower, theirs, NAMES).state
    if isinstance(text.text_projection, nn.Linear):
        state["projection"] = state["projection"].T
    for name in ("projection", "projection_bias"):
        if name in state:
            setattr(tower, name, nn.Parameter(torch.empty(state[name].shape, device="meta")))
    try:
        tower.load_state_dict(state, strict=True, assign=True)
    except RuntimeError:  # other parts
        return None
    tower.set_mask()
    return tower.eval().requires_grad_(False)


POOLS = ("argmax", "eos", "first", "last")
PARTS = ("positional_embedding", "token_embedding.", "transformer.", "ln_final.", "text_projection")
_IDENTITY = Identity()
