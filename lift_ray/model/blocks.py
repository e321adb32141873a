"""Transformer blocks with explicit linears, and a place for a tuner at every projection, norm and sum.

T tokens are the class token, if there is one, R register tokens, prompts of a tuner, then the patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lift_ray.model.linear import linear
from lift_ray.model.positions import RelativeBias, turned
from lift_ray.model.tuners.base import BlockTuner

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
        """Return the bias of the scores, (T, T) or (H, T, T), only its first row for the class token; None for nothing."""
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
