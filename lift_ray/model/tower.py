"""Frozen vision transformers with explicit linears.

The blocks of open_clip hold an nn.MultiheadAttention, whose projections cannot be changed from outside without silently having
no effect. These blocks compute the same features (tests compare them) and give a tuner a place at every projection.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lift_ray.model.linear import linear
from lift_ray.model.tuners.base import BlockTuner, Identity


class Attention(nn.Module):
    """Multi-head self-attention with its projections as plain linears.

    Attributes:
        bias_mask: (T, T) that is added to the scores, -inf where a token must not look; None without. Fewer tokens use its corner.
    """

    bias_mask: Tensor | None

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.register_buffer("bias_mask", None, persistent=False)
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, h: Tensor, tuner: BlockTuner, class_token_only: bool) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, 1, D) when only the class token is asked for."""
        width, weight, bias = h.shape[-1], self.in_proj.weight, self.in_proj.bias
        if class_token_only:
            first = h[:, :1]
            q = tuner.query(first, linear(first, weight[:width], bias[:width]))
            if type(tuner).key is BlockTuner.key and type(tuner).value is BlockTuner.value:
                return self._out(self._one_query(q, h, weight[width:], bias[2 * width :]), tuner)
            k, v = linear(h, weight[width:], bias[width:]).split(width, dim=-1)
        else:
            q, k, v = linear(h, weight, bias).split(width, dim=-1)
            q = tuner.query(h, q)
        k, v = tuner.key(h, k), tuner.value(h, v)
        heads = (self.num_heads, width // self.num_heads)
        out = F.scaled_dot_product_attention(
            q.unflatten(-1, heads).transpose(1, 2),
            k.unflatten(-1, heads).transpose(1, 2),
            v.unflatten(-1, heads).transpose(1, 2),
            attn_mask=None if self.bias_mask is None else self.bias_mask[: h.shape[1], : h.shape[1]],
        )
        return self._out(out.transpose(1, 2).flatten(2), tuner)

    def _one_query(self, q: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Attention output of one token, (B, 1, D), from the normed input (B, T, D), without the keys and values of all tokens.

        q (W_k h) = (q W_k) h and sum_t p_t (W_v h_t) = W_v (sum_t p_t h_t). The keys' bias moves all scores alike.

        Args:
            q: its query (B, 1, D).
            weight: of keys and values (2 D, D).
            bias: of values (D,).
        """
        heads = (self.num_heads, h.shape[-1] // self.num_heads)
        key, value = weight.unflatten(0, (2, *heads))  # (H, D/H, D)
        q = torch.bmm(q.flatten(1).unflatten(-1, heads).transpose(0, 1), key).transpose(0, 1)  # (B, H, D)
        seen = torch.bmm(torch.softmax(torch.bmm(q, h.transpose(1, 2)) * heads[1] ** -0.5, dim=-1), h)  # (B, H, D)
        out = torch.bmm(seen.transpose(0, 1), value.transpose(1, 2)).transpose(0, 1)  # (B, H, D/H)
        return out.flatten(1).unsqueeze(1) + bias

    def _out(self, seen: Tensor, tuner: BlockTuner) -> Tensor:
        return tuner.attention_out(linear(seen, self.out_proj.weight, self.out_proj.bias))


class Mlp(nn.Module):
    """Two linears around the activation that the weights were trained with."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, hidden)
        self.out_proj = nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, h: Tensor, tuner: BlockTuner) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        inner = self.activation(tuner.mlp_in(h, linear(h, self.in_proj.weight, self.in_proj.bias)))
        return tuner.mlp_out(inner, linear(inner, self.out_proj.weight, self.out_proj.bias))


class Block(nn.Module):
    """A pre-norm transformer block with places for a tuner."""

    def __init__(
        self, width: int, num_heads: int, hidden: int, activation: Callable[[Tensor], Tensor], eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, hidden, activation)

    def forward(self, h: Tensor, tuner: BlockTuner, class_token_only: bool = False) -> Tensor:
        """a = h + Attn(LN1(h)); out = a + MLP(LN2(a)) + tuner.beside_mlp(a); (B, T, D) -> (B, T or 1, D)."""
        normed = tuner.norm1(self.norm1(h))
        a = (h[:, :1] if class_token_only else h) + self.attn(normed, tuner, class_token_only)
        return tuner.beside_mlp(a, a + self.mlp(tuner.norm2(self.norm2(a)), tuner))


class SharedWeights(nn.Module):
    """A frozen module, copies of which share its tensors."""

    def with_own(self, names: Iterable[str]) -> Self:
        """The same module with copies of the named parameters to train; all other tensors are shared."""
        own = set(names)
        shared: dict[int, Tensor] = {id(b): b for b in self.buffers()}
        for name, p in self.named_parameters():
            shared[id(p)] = nn.Parameter(p.detach().clone()) if name in own else p
        return copy.deepcopy(self, shared)


class FrozenTower(SharedWeights):
    """Interface of all image towers: `embed`, then `blocks_until` and `finish`, which each kind implements."""

    patch_px: int
    embed: Callable[..., Tensor]
    finish: Callable[..., Tensor]

    def num_patches(self, resolution_px: int) -> int:
        """Number of patches in an image of this side; for a residual network, of places that its attention pool sees."""
        return (resolution_px // self.patch_px) ** 2

    def forward(
        self, images: Tensor, tuners: Sequence[BlockTuner] | None = None, patches: Tensor | None = None
    ) -> Tensor:
        """Features before CLIP's projection: (B, 3, H, W) normalised images -> (B, D).

        Args:
            tuners: one for each block.
            patches: (B, P), the patches to look at; all when not given.
        """
        return self.finish(self.embed(images, patches), tuners)


class Tower(FrozenTower):
    """A frozen vision transformer.

    Only the class token of the last block reaches the classifier, so that block computes its queries, MLP and tuner for
    that token alone, and no keys and values unless a tuner changes those. Nothing below the first tuned block enters the
    autograd graph, because nothing there requires a gradient.

    Args:
        width: D.
        hidden: width of the MLPs.
        patch_px, resolution_px: sides of a patch and of the images.
        norm_first: a layer norm before the first block (CLIP).
        patch_bias: a bias in the patch embedding (timm).
        checkpointing: compute activations again in the backward pass, to save memory.
    """

    attention = True

    def __init__(
        self,
        *,
        width: int,
        num_blocks: int,
        num_heads: int,
        hidden: int,
        patch_px: int,
        resolution_px: int,
        activation: Callable[[Tensor], Tensor],
        eps: float = 1e-5,
        norm_first: bool = True,
        patch_bias: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.num_blocks, self.patch_px, self.resolution_px = width, num_blocks, patch_px, resolution_px
        self.hidden, self.checkpointing = hidden, checkpointing
        self.patch = nn.Conv2d(3, width, patch_px, patch_px, bias=patch_bias)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros((resolution_px // patch_px) ** 2 + 1, width))
        self.norm_pre: nn.Module = nn.LayerNorm(width, eps) if norm_first else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, num_heads, hidden, activation, eps) for _ in range(num_blocks))
        self.norm_post = nn.LayerNorm(width, eps)
        self._resized: dict[int, Tensor] = {}

    @property
    def activation_bytes(self) -> int:
        """Bytes of the largest activation of one image in fp32: between the two linears of an MLP."""
        return 4 * self.hidden * (self.num_patches(self.resolution_px) + 1)

    def embed(self, images: Tensor, patches: Tensor | None = None) -> Tensor:
        """Input of the first block: (B, 3, H, W) -> (B, T, D)."""
        x = self.patch(images).flatten(2).transpose(1, 2)
        positions = self._positions(images.shape[-1] // self.patch_px).to(x.dtype)
        x = x + positions[1:]
        if patches is not None:
            x = x.gather(1, patches[..., None].expand(-1, -1, x.shape[2]))
        first = self.class_token.to(x.dtype) + positions[0]
        out: Tensor = self.norm_pre(torch.cat([first.expand(len(x), 1, -1), x], dim=1))
        return out

    def blocks_until(self, x: Tensor, stop: int, start: int = 0) -> Tensor:
        """The blocks from `start` to `stop` without tuners, which are the same for every model: (B, T, D) -> (B, T or 1, D)."""
        for index in range(start, stop):
            x = self.blocks[index](x, _IDENTITY, index == self.num_blocks - 1)
        return x

    def finish(self, x: Tensor, tuners: Sequence[BlockTuner] | None = None, start: int = 0) -> Tensor:
        """The blocks from `start` on, and the class token's feature: (B, T, D) -> (B, D)."""
        tuners = tuners or [_IDENTITY] * self.num_blocks
        num_prompts = 0
        for index in range(start, self.num_blocks):
            tuner, last = tuners[index], index == self.num_blocks - 1
            x, num_prompts = tuner.tokens(x, num_prompts)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.blocks[index], x, tuner, last, use_reentrant=False)
            else:
                x = self.blocks[index](x, tuner, last)
        feature: Tensor = self.norm_post(x[:, 0])
        return feature

    def _positions(self, side: int) -> Tensor:
        """(1 + side^2, D): resized (bicubic) if the images have another size than the weights were trained with."""
        if side not in self._resized:
            self._resized[side] = resized(self.positions, side)
        return self._resized[side]


@torch.no_grad()
def resized(positions: Tensor, side: int) -> Tensor:
    """(1 + n^2, D) -> (1 + side^2, D): the first row unchanged, the rest resized as a square grid (bicubic)."""
    trained = round((len(positions) - 1) ** 0.5)
    if side == trained:
        return positions
    grid = positions[1:].T.reshape(1, -1, trained, trained)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid.flatten(2)[0].T])


_IDENTITY = Identity()
