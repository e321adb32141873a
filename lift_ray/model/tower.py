"""Frozen vision transformers with explicit linears.

The blocks of open_clip hold an nn.MultiheadAttention, whose projections cannot be changed from outside without silently having
no effect. These blocks compute the same features (tests compare them) and give a tuner a place at every projection.

Terms: T tokens are the class token, if there is one, R register tokens, prompts of a tuner, then the patches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lift_ray.model.linear import linear
from lift_ray.model.positions import RelativeBias, Rotary, resized, turned
from lift_ray.model.tuners.base import BlockTuner, Identity

Activation = Callable[[Tensor], Tensor]
MakeNorm = Callable[[int], nn.Module]


@dataclass(frozen=True)
class BlockShape:
    """The architecture of a transformer's blocks.

    Attributes:
        width: D, of the tokens.
        hidden: width of the MLPs between their two linears.
        activation: of the MLPs.
        norm: width -> a norm. Norms have a weight; a layer norm has a bias too.
        post_norm: the norms come after attention and MLP, not before them (EVA-02 E).
        query_norm: queries and keys are normed, head by head.
        inner_norm: the output of the heads is normed before its projection.
        gated_mlp: the first linear of an MLP makes a gate beside its values: activation(gate) * values (arXiv 2002.05202).
        mlp_norm: the hidden values of an MLP are normed before the second linear.
        rotary_half: the two values that rotary positions turn together are half a head apart, not neighbors.
        relative_side: patches on a side of the image if the scores have a bias by distance (BEiT); 0 if they have none.
    """

    width: int
    num_heads: int
    hidden: int
    activation: Activation
    norm: MakeNorm = nn.LayerNorm
    post_norm: bool = False
    query_norm: bool = False
    inner_norm: bool = False
    gated_mlp: bool = False
    mlp_norm: bool = False
    rotary_half: bool = False
    relative_side: int = 0

    @property
    def mlp_inputs(self) -> int:
        """Outputs of the first linear of an MLP: the hidden values, and a gate for each if the MLP is gated."""
        return 2 * self.hidden if self.gated_mlp else self.hidden


class Attention(nn.Module):
    """Multi-head self-attention with its projections as plain linears.

    Attributes:
        relative: bias of the scores by the distance of two patches (BEiT); None for towers without it.
        mask: (T, T), added to the scores, -inf where a token must not look; None without. Fewer tokens use its corner.
    """

    mask: Tensor | None

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.num_heads, self.rotary_half = shape.num_heads, shape.rotary_half
        head_width = shape.width // shape.num_heads
        self.in_proj = nn.Linear(shape.width, 3 * shape.width)
        self.q_norm = shape.norm(head_width) if shape.query_norm else None
        self.k_norm = shape.norm(head_width) if shape.query_norm else None
        self.norm = shape.norm(shape.width) if shape.inner_norm else None
        self.out_proj = nn.Linear(shape.width, shape.width)
        self.relative = RelativeBias(shape.relative_side, shape.num_heads) if shape.relative_side else None
        self.register_buffer("mask", None, persistent=False)

    def forward(self, h: Tensor, tuner: BlockTuner, class_token_only: bool, rotary: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, 1, D) when only the class token is asked for.

        Args:
            rotary: angles of the patches (..., N, 2 D / H), which are the last N tokens.
        """
        width, weight, bias = h.shape[-1], self.in_proj.weight, self.in_proj.bias
        if class_token_only:
            first = h[:, :1]
            q = tuner.query(first, linear(first, weight[:width], bias[:width]))
            if self._is_plain(rotary) and _keeps_keys(tuner):
                return self._out(self._one_query(q, h, weight[width:], bias[2 * width :]), tuner)
            k, v = linear(h, weight[width:], bias[width:]).split(width, dim=-1)
        else:
            q, k, v = linear(h, weight, bias).split(width, dim=-1)
            q = tuner.query(h, q)
        k, v = tuner.key(h, k), tuner.value(h, v)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:  # the class token has no angle
            q = q if class_token_only else turned(q, rotary, self.rotary_half)
            k = turned(k, rotary, self.rotary_half)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias(h.shape[1], class_token_only, q.dtype))
        return self._out(out.transpose(1, 2).flatten(2), tuner)

    def _is_plain(self, rotary: Tensor | None) -> bool:
        """Return True if the scores are the products of queries and keys, and nothing else."""
        return self.relative is None and self.mask is None and self.k_norm is None and rotary is None

    def _bias(self, num_tokens: int, class_token_only: bool, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores, (T, T) or (H, T, T), only its first row for the class token; None for nothing."""
        if self.relative is not None:
            bias: Tensor = self.relative(num_tokens)
        elif self.mask is not None:
            bias = self.mask[:num_tokens, :num_tokens]
        else:
            return None
        return (bias[..., :1, :] if class_token_only else bias).to(dtype)

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
        seen = seen if self.norm is None else self.norm(seen)
        return tuner.attention_out(linear(seen, self.out_proj.weight, self.out_proj.bias))


def _keeps_keys(tuner: BlockTuner) -> bool:
    """Return True if a tuner changes neither keys nor values."""
    return type(tuner).key is BlockTuner.key and type(tuner).value is BlockTuner.value


class Mlp(nn.Module):
    """Two linears around the activation that the weights were trained with, gated or not."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.in_proj = nn.Linear(shape.width, shape.mlp_inputs)
        self.norm = shape.norm(shape.hidden) if shape.mlp_norm else None
        self.out_proj = nn.Linear(shape.hidden, shape.width)
        self.activation, self.is_gated = shape.activation, shape.gated_mlp

    def forward(self, h: Tensor, tuner: BlockTuner) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        inner = tuner.mlp_in(h, linear(h, self.in_proj.weight, self.in_proj.bias))
        if self.is_gated:
            gate, values = inner.chunk(2, dim=-1)
            inner = self.activation(gate) * values
        else:
            inner = self.activation(inner)
        inner = inner if self.norm is None else self.norm(inner)
        return tuner.mlp_out(inner, linear(inner, self.out_proj.weight, self.out_proj.bias))


class Block(nn.Module):
    """A transformer block with places for a tuner."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.norm1 = shape.norm(shape.width)
        self.attn = Attention(shape)
        self.norm2 = shape.norm(shape.width)
        self.mlp = Mlp(shape)
        self.post_norm = shape.post_norm

    def forward(
        self, h: Tensor, tuner: BlockTuner, class_token_only: bool = False, rotary: Tensor | None = None
    ) -> Tensor:
        """a = h + Attn(LN1(h)); out = a + MLP(LN2(a)) + tuner.beside_mlp(a); (B, T, D) -> (B, T or 1, D).

        With norms behind: a = h + LN1(Attn(h)); out = a + LN2(MLP(a)) + tuner.beside_mlp(a).
        """
        mine = h[:, :1] if class_token_only else h
        if self.post_norm:
            a = mine + tuner.norm1(self.norm1(self.attn(h, tuner, class_token_only, rotary)))
            return tuner.beside_mlp(a, a + tuner.norm2(self.norm2(self.mlp(a, tuner))))
        a = mine + self.attn(tuner.norm1(self.norm1(h)), tuner, class_token_only, rotary)
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
    """Interface of all towers: `embed`, then `blocks_until` and `finish`, which each kind implements.

    Attributes:
        family: transformer, resnet, stages or opaque: which tuners have a place in it.
        make: name of the architecture, for messages.
        norm: the kind of tuner that trains the norms of the blocks; "" without norms.
        blocks: that tuners can change.
        width: D, of the feature.
        patch_px: side of a patch; of the square that a place of the last stage stands for, if it is convolutional.
        resolution_px: side of the images.
        can_drop_patches: images can be looked at in part.
        origin_names: our name of each tensor -> its name in the origin; None if some were joined or scaled.
    """

    family: str
    make: str
    norm: str
    num_blocks: int
    blocks: nn.ModuleList
    checkpointing: bool
    width: int
    patch_px: int
    resolution_px: int
    embed: Callable[..., Tensor]
    blocks_until: Callable[..., Tensor]
    finish: Callable[..., Tensor]
    origin_names: dict[str, str] | None = None
    can_drop_patches = False

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: nothing in a frozen tower is random or follows the batch."""
        return super().train(False)

    @property
    def activation_bytes(self) -> int:
        """Bytes of the largest activation of one image in fp32."""
        raise NotImplementedError(type(self).__name__)

    def block_width(self, index: int) -> int:
        """Return the width of a block's output."""
        raise NotImplementedError(type(self).__name__)

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
        return self.finish(self.embed(images, patches), tuners, patches=patches, size_px=images.shape[-1])


class Pool(nn.Module):
    """From the tokens after the last block, (B, T, D), to the feature: the class token, or the mean of the patches.

    Args:
        kind: of the two.
        norm: of the tokens before; of the feature if `norm_last`.
        first_patch: number of tokens before the patches that the mean leaves out, without prompts.
    """

    def __init__(self, kind: Literal["class", "mean"], norm: nn.Module, norm_last: bool = False, first_patch: int = 1):
        super().__init__()
        self.kind, self.norm, self.norm_last, self.first_patch = kind, norm, norm_last, first_patch

    @property
    def needs_class_token_only(self) -> bool:
        """True if no other token changes the feature."""
        return self.kind == "class"

    def forward(self, x: Tensor, num_prompts: int = 0) -> Tensor:
        """(B, T, D), of which `num_prompts` are prompts -> (B, D)."""
        if self.kind == "class":
            feature: Tensor = self.norm(x[:, 0])
            return feature
        x = x[:, self.first_patch + num_prompts :]
        mean: Tensor = self.norm(x.mean(1)) if self.norm_last else self.norm(x).mean(1)
        return mean


class AttentionPool(nn.Module):
    """Attention of learned queries over all tokens, the origin's own module: (B, T, D) -> (B, D') (SigLIP, PE, CoCa).

    Args:
        pool: (B, T, D) -> (B, D').
        norm: of the tokens before.
        norm_last: of the feature.
        first_patch: tokens that it leaves out, without prompts: all before the patches, or none.
    """

    needs_class_token_only = False

    def __init__(self, pool: nn.Module, norm: nn.Module, norm_last: nn.Module, first_patch: int = 0) -> None:
        super().__init__()
        self.pool, self.norm, self.norm_last, self.first_patch = pool, norm, norm_last, first_patch

    def forward(self, x: Tensor, num_prompts: int = 0) -> Tensor:
        """(B, T, D) -> (B, D'); prompts are left out with what stands before the patches."""
        x = x[:, self.first_patch + num_prompts :] if self.first_patch else x
        feature: Tensor = self.norm_last(self.pool(self.norm(x)))
        return feature


class Tower(FrozenTower):
    """A frozen vision transformer.

    If only the class token of the last block reaches the classifier, that block computes its queries, MLP and tuner for
    that token alone, and no keys and values unless a tuner changes those. Nothing below the first tuned block enters the
    autograd graph, because nothing there requires a gradient.

    Args:
        shape: of the blocks.
        patch_px, resolution_px: sides of a patch and of the images.
        patch: images (B, 3, H, W) -> patches (B, D, H', W') or (B, N, D); by default a convolution without bias.
        pool: from the tokens after the last block to the feature; by default the class token after a norm.
        feature_width: of that.
        class_token: there is one.
        num_registers: tokens after the class token that are learned as it is.
        positions: which tokens have a learned position: all, the patches, or none.
        norm_first: a norm before the first block (CLIP).
        rotary: rotary positions of the patches.
        checkpointing: compute activations again in the backward pass, to save memory.
    """

    family, make, norm = "transformer", "VisionTransformer", "layernorm"

    def __init__(
        self,
        shape: BlockShape,
        *,
        num_blocks: int,
        patch_px: int,
        resolution_px: int,
        patch: nn.Module | None = None,
        pool: Pool | AttentionPool | None = None,
        feature_width: int | None = None,
        class_token: bool = True,
        num_registers: int = 0,
        positions: Literal["all", "patches", "none"] = "all",
        norm_first: bool = True,
        rotary: Rotary | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.num_blocks, self.patch_px, self.resolution_px = shape, num_blocks, patch_px, resolution_px
        self.width, self.checkpointing = feature_width or shape.width, checkpointing
        self.patch = patch or nn.Conv2d(3, shape.width, patch_px, patch_px, bias=False)
        self.class_token = nn.Parameter(torch.zeros(shape.width)) if class_token else None
        self.registers = nn.Parameter(torch.zeros(num_registers, shape.width)) if num_registers else None
        self.num_prefix = int(class_token) + num_registers
        self.prefix_positions = self.num_prefix if positions == "all" else 0
        rows = (resolution_px // patch_px) ** 2 + self.prefix_positions
        self.positions = None if positions == "none" else nn.Parameter(torch.zeros(rows, shape.width))
        self.norm_pre: nn.Module = shape.norm(shape.width) if norm_first else nn.Identity()
        self.blocks = nn.ModuleList(Block(shape) for _ in range(num_blocks))
        self.pool = pool or Pool("class", shape.norm(shape.width))
        self.rotary = rotary
        self.can_drop_patches = not shape.relative_side  # a bias by distance is for whole images
        self._resized: dict[int, Tensor] = {}

    @property
    def activation_bytes(self) -> int:
        """Bytes of the largest activation of one image in fp32: between the two linears of an MLP."""
        return 4 * self.shape.mlp_inputs * (self.num_patches(self.resolution_px) + self.num_prefix)

    @property
    def prompts_at(self) -> int:
        """Number of the token before which prompts are put: after the class token, or at the start."""
        return int(self.class_token is not None)

    def block_width(self, index: int) -> int:
        """D, of every block."""
        return self.shape.width

    def embed(self, images: Tensor, patches: Tensor | None = None) -> Tensor:
        """Input of the first block: (B, 3, H, W) -> (B, T, D)."""
        x = self.patch(images)
        x = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        positions = self._positions(images.shape[-1] // self.patch_px, x.dtype)
        if positions is not None:
            x = x + positions[self.prefix_positions :]
        if patches is not None:
            x = x.gather(1, patches[..., None].expand(-1, -1, x.shape[2]))
        if self.num_prefix:
            parts = [self.class_token[None] if self.class_token is not None else None, self.registers]
            first = torch.cat([part for part in parts if part is not None]).to(x.dtype)
            if positions is not None and self.prefix_positions:
                first = first + positions[: self.prefix_positions]
            x = torch.cat([first.expand(len(x), -1, -1), x], dim=1)
        out: Tensor = self.norm_pre(x)
        return out

    def blocks_until(self, x: Tensor, stop: int, start: int = 0) -> Tensor:
        """The blocks from `start` to `stop` without tuners, which are the same for every model: (B, T, D) -> (B, T or 1, D)."""
        angles = self._angles(x, None, None)
        for index in range(start, stop):
            x = self.blocks[index](x, _IDENTITY, self._is_last(index), _of_block(angles, index))
        return x

    def finish(
        self,
        x: Tensor,
        tuners: Sequence[BlockTuner] | None = None,
        start: int = 0,
        *,
        patches: Tensor | None = None,
        size_px: int | None = None,
    ) -> Tensor:
        """The blocks from `start` on, and the pool: (B, T, D) -> (B, D).

        Args:
            tuners: one for each block.
            start: x is the output of the blocks below this one.
            patches: (B, P), the patches that `embed` looked at; all when not given.
            size_px: side of the images; by default that whose patches are in x.
        """
        tuners = tuners or [_IDENTITY] * self.num_blocks
        num_prompts, angles = 0, self._angles(x, patches, size_px)
        for index in range(start, self.num_blocks):
            tuner, last = tuners[index], self._is_last(index)
            x, num_prompts = tuner.tokens(x, num_prompts)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.blocks[index], x, tuner, last, _of_block(angles, index), use_reentrant=False)
            else:
                x = self.blocks[index](x, tuner, last, _of_block(angles, index))
        feature: Tensor = self.pool(x, num_prompts)
        return feature

    def _is_last(self, index: int) -> bool:
        """Return True for the block of which only the class token is needed."""
        return index == self.num_blocks - 1 and self.pool.needs_class_token_only

    def _angles(self, x: Tensor, patches: Tensor | None, size_px: int | None) -> Tensor | None:
        """Rotary angles of the patches in x, before any prompts: as `Rotary`, or (B, ...) of those that were chosen."""
        if self.rotary is None:
            return None
        side = size_px // self.patch_px if size_px else math.isqrt(x.shape[1] - self.num_prefix)
        angles: Tensor = self.rotary(side, patches)
        return angles

    def _positions(self, side: int, dtype: torch.dtype) -> Tensor | None:
        """(P + side^2, D): resized (bicubic) if the images have another size than the weights were trained with."""
        if self.positions is None:
            return None
        if side not in self._resized:
            self._resized[side] = resized(self.positions, side, self.prefix_positions)
        positions: Tensor = self._resized[side].to(dtype)
        return positions


def _of_block(angles: Tensor | None, index: int) -> Tensor | None:
    """Return the angles of a block: its own if every block has some, (blocks, H, N, ...), else those of all."""
    return angles[index] if angles is not None and angles.dim() == 4 + 1 else angles


_IDENTITY = Identity()
