"""The small trained parts of a frozen tower.

Most kinds are one BlockTuner for each tuned block: the block asks it at fixed places, and a tuner overrides the places it
changes. Parameter names in a checkpoint are `<tuner>.<block>.<parameter>`. Other kinds train parameters that the tower
has already (`own_names`), or a few of their values (`Sparse`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize


class BlockTuner(nn.Module):
    """Changes nothing at any place of a block. B images, T tokens, D width, R bottleneck, P prompt tokens."""

    def tokens(self, x: Tensor, num_prompts: int) -> tuple[Tensor, int]:
        """The block's input (B, T, D), of which `num_prompts` tokens after the class token are prompts -> both again."""
        return x, num_prompts

    def norm1(self, h: Tensor) -> Tensor:
        """The attention's normed input (B, T, D)."""
        return h

    def query(self, h: Tensor, q: Tensor) -> Tensor:
        """Normed input (B, T, D) and its query projection (B, T, D) -> queries."""
        return q

    def key(self, h: Tensor, k: Tensor) -> Tensor:
        """Normed input (B, T, D) and its key projection (B, T, D) -> keys."""
        return k

    def value(self, h: Tensor, v: Tensor) -> Tensor:
        """Normed input (B, T, D) and its value projection (B, T, D) -> values."""
        return v

    def attention_out(self, out: Tensor) -> Tensor:
        """The attention's output after its projection (B, T, D)."""
        return out

    def norm2(self, h: Tensor) -> Tensor:
        """The MLP's normed input (B, T, D)."""
        return h

    def mlp_in(self, h: Tensor, inner: Tensor) -> Tensor:
        """Normed input (B, T, D) and its first projection (B, T, 4D), before the activation."""
        return inner

    def mlp_out(self, inner: Tensor, out: Tensor) -> Tensor:
        """After the activation (B, T, 4D) and its second projection (B, T, D) -> the MLP's output."""
        return out

    def beside_mlp(self, a: Tensor, out: Tensor) -> Tensor:
        """The MLP's input before its norm and the block's output, both (B, T, D) -> output."""
        return out

    def conv(self, index: int, x: Tensor) -> Tensor:
        """A residual block's convolution 0 ... 3 after its norm, 3 on the shortcut: (B, C, H, W) of those channels."""
        return x


class Identity(BlockTuner):
    """For blocks without a tuner."""


class Bottleneck(BlockTuner):
    """Up(ReLU(Down(LN(x)))), zero at the start: Up and the biases are zero, Down is Kaiming uniform."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def inner(self, x: Tensor) -> Tensor:
        """ReLU(Down(LN(x))): (B, T, D) -> (B, T, R)."""
        return F.relu(self.down(self.norm(x)))


class Adaptformer(Bottleneck):
    """out + s * Up(ReLU(Down(LN(a)))), s learnable (arXiv 2205.13535, as in arXiv 2309.10019)."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__(width, bottleneck)
        self.scale = nn.Parameter(torch.ones(()))

    def beside_mlp(self, a: Tensor, out: Tensor) -> Tensor:
        """Adds the bottleneck's output; s scales the small weights and not the large output."""
        # (R, D): products with (D, R) are slow in the backward pass
        up = (self.scale * self.up.weight).t().contiguous()
        inner = self.inner(a).flatten(0, -2)
        return out + torch.addmm(self.scale * self.up.bias, inner, up).view_as(out)


class Adapter(Bottleneck):
    """m + Up(ReLU(Down(LN(m)))) for the MLP's output m (arXiv 1902.00751, as in arXiv 2309.10019)."""

    def mlp_out(self, inner: Tensor, out: Tensor) -> Tensor:
        """Adds the bottleneck's output."""
        changed: Tensor = out + self.up(self.inner(out))
        return changed


class LowRank(nn.Module):
    """x @ down @ up / R, zero at the start (arXiv 2106.09685 with alpha = 1)."""

    def __init__(self, width: int, bottleneck: int, out_width: int | None = None) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(width, bottleneck))
        self.up = nn.Parameter(torch.zeros(bottleneck, out_width or width))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D')."""
        return x @ self.down @ (self.up / self.down.shape[1])


class Lora(BlockTuner):
    """Low-rank changes of the query and value projections, on request of the MLP's too (arXiv 2106.09685)."""

    def __init__(self, width: int, hidden: int, bottleneck: int, mlp: bool = False) -> None:
        super().__init__()
        self.q = LowRank(width, bottleneck)
        self.v = LowRank(width, bottleneck)
        if mlp:
            self.fc1, self.fc2 = LowRank(width, bottleneck, hidden), LowRank(hidden, bottleneck, width)
        self.mlp = mlp

    def query(self, h: Tensor, q: Tensor) -> Tensor:
        """q + h A_q B_q / R."""
        changed: Tensor = q + self.q(h)
        return changed

    def value(self, h: Tensor, v: Tensor) -> Tensor:
        """v + h A_v B_v / R."""
        changed: Tensor = v + self.v(h)
        return changed

    def mlp_in(self, h: Tensor, inner: Tensor) -> Tensor:
        """The same at the MLP's first projection."""
        return inner + self.fc1(h) if self.mlp else inner

    def mlp_out(self, inner: Tensor, out: Tensor) -> Tensor:
        """The same at the MLP's second projection."""
        return out + self.fc2(inner) if self.mlp else out


class ScaleShift(nn.Module):
    """x * scale + shift; scale from N(1, 0.02), shift from N(0, 0.02) (arXiv 2210.08823)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + 0.02 * torch.randn(width))
        self.shift = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, x: Tensor, part: slice = slice(None)) -> Tensor:
        """(..., D) -> (..., D), with a part of the channels when x has only those."""
        return torch.addcmul(self.shift[part].to(x.dtype), x, self.scale[part].to(x.dtype))


class Ssf(BlockTuner):
    """Scale and shift after each projection, on request after the norms too (arXiv 2210.08823). Starts near the identity."""

    def __init__(self, width: int, hidden: int, norms: bool = False) -> None:
        super().__init__()
        self.width, self.norms = width, norms
        self.attn_in, self.attn_out = ScaleShift(3 * width), ScaleShift(width)
        self.mlp_1, self.mlp_2 = ScaleShift(hidden), ScaleShift(width)
        if norms:
            self.after_norm1, self.after_norm2 = ScaleShift(width), ScaleShift(width)

    def query(self, h: Tensor, q: Tensor) -> Tensor:
        """The first third of the attention's input projection."""
        changed: Tensor = self.attn_in(q, slice(0, self.width))
        return changed

    def key(self, h: Tensor, k: Tensor) -> Tensor:
        """The second third."""
        changed: Tensor = self.attn_in(k, slice(self.width, 2 * self.width))
        return changed

    def value(self, h: Tensor, v: Tensor) -> Tensor:
        """The last third."""
        changed: Tensor = self.attn_in(v, slice(2 * self.width, None))
        return changed

    def attention_out(self, out: Tensor) -> Tensor:
        """After the attention's output projection."""
        changed: Tensor = self.attn_out(out)
        return changed

    def mlp_in(self, h: Tensor, inner: Tensor) -> Tensor:
        """After the MLP's first projection."""
        changed: Tensor = self.mlp_1(inner)
        return changed

    def mlp_out(self, inner: Tensor, out: Tensor) -> Tensor:
        """After the MLP's second projection."""
        changed: Tensor = self.mlp_2(out)
        return changed

    def norm1(self, h: Tensor) -> Tensor:
        """After the first norm."""
        return self.after_norm1(h) if self.norms else h

    def norm2(self, h: Tensor) -> Tensor:
        """After the second norm."""
        return self.after_norm2(h) if self.norms else h


class Prompt(BlockTuner):
    """Learned tokens after the class token, in the place of those that are there (VPT, arXiv 2203.12119).

    Uniform in +-sqrt(6 / (3 patch^2 + D)) at the start, as there.
    """

    def __init__(self, width: int, patch_px: int, length: int) -> None:
        super().__init__()
        bound = math.sqrt(6 / (3 * patch_px**2 + width))
        self.prompt = nn.Parameter(torch.empty(length, width).uniform_(-bound, bound))

    def tokens(self, x: Tensor, num_prompts: int) -> tuple[Tensor, int]:
        """(B, 1 + n + P, D) -> (B, 1 + L + P, D)."""
        prompt = self.prompt.to(x.dtype).expand(len(x), -1, -1)
        return torch.cat([x[:, :1], prompt, x[:, 1 + num_prompts :]], dim=1), len(self.prompt)


class Both(BlockTuner):
    """Two tuners of one block: at each place the first, then the second."""

    def __init__(self, first: BlockTuner, second: BlockTuner) -> None:
        super().__init__()
        self.parts = [first, second]  # a plain list: both are registered in the Tuner already

    def tokens(self, x: Tensor, num_prompts: int) -> tuple[Tensor, int]:
        """See BlockTuner."""
        for part in self.parts:
            x, num_prompts = part.tokens(x, num_prompts)
        return x, num_prompts


def _both(place: str) -> Callable[..., Tensor]:
    def ask(self: Both, *args: Tensor) -> Tensor:
        """See BlockTuner."""
        *first, changed = args
        for part in self.parts:
            changed = getattr(part, place)(*first, changed)
        return changed

    return ask


for _place in ("norm1", "query", "key", "value", "attention_out", "norm2", "mlp_in", "mlp_out", "beside_mlp", "conv"):
    setattr(Both, _place, _both(_place))


class Sparse(nn.Module):
    """A parametrisation: some values of a frozen tensor are trained, at places chosen by torch's seed and the tensor's name."""

    index: Tensor

    def __init__(self, frozen: Tensor, ratio: float, name: str) -> None:
        super().__init__()
        number = max(1, round(ratio * frozen.numel()))
        # The places are not stored: they depend on the seed and the name alone, whatever else drew numbers before.
        random = torch.Generator().manual_seed((torch.initial_seed() + zlib.crc32(name.encode())) % 2**63)
        index = torch.randperm(frozen.numel(), generator=random)[:number]
        self.register_buffer("index", index.to(frozen.device), persistent=False)
        self.values = nn.Parameter(frozen.detach().flatten()[self.index].clone())

    def forward(self, frozen: Tensor) -> Tensor:
        """The tensor with its trained values in place."""
        return frozen.flatten().index_copy(0, self.index, self.values).view_as(frozen)


def add_sparse(tower: nn.Module, blocks: Sequence[int], ratio: float) -> None:
    """Train a random share of the weights and biases of the linears in these blocks (AFT, arXiv 2309.10019)."""
    for index in blocks:
        block: nn.Module = tower.blocks[index]  # type: ignore[index,assignment]
        for at, linear in [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]:
            for name in ("weight", "bias"):
                sparse = Sparse(getattr(linear, name), ratio, f"{index}.{at}.{name}")
                parametrize.register_parametrization(linear, name, sparse)


def own_names(tower: nn.Module, kind: str, blocks: Sequence[int]) -> list[str]:
    """Names of the tower's own parameters that a kind trains in these blocks."""
    inside = [n for n, _ in tower.named_parameters() if n.startswith("blocks.") and int(n.split(".")[1]) in blocks]
    norms = {n for n, m in tower.named_modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)}
    return [name for name in inside if OWN[kind](name, name.rpartition(".")[0] in norms)]


class Tuner(nn.Module):
    """The tuners of all blocks: one for each tuned block, Identity elsewhere.

    Args:
        parts: for each kind its options: what its constructor takes beside the tower's sizes, and `blocks`. Kinds that put
            nothing into the blocks leave no trace here.
        tower: its width, hidden, patch_px, num_blocks and attention are asked for; without attention, its `make_ssf`.
    """

    def __init__(self, parts: dict[str, dict[str, Any]], tower: Any) -> None:
        super().__init__()
        self.per_block: list[BlockTuner] = [_IDENTITY] * tower.num_blocks
        for kind, given in parts.items():
            options = dict(given)
            blocks = options.pop("blocks", None) or [0]
            if kind not in BLOCK_TUNERS:
                continue
            tuned = {str(i): BLOCK_TUNERS[kind](tower, i, **options) for i in blocks}
            self.add_module(kind, nn.ModuleDict(tuned))
            for i in blocks:
                before = self.per_block[i]
                self.per_block[i] = tuned[str(i)] if before is _IDENTITY else Both(before, tuned[str(i)])


_IDENTITY = Identity()
BLOCK_TUNERS: dict[str, Callable[..., BlockTuner]] = {
    "adaptformer": lambda tower, index, **options: Adaptformer(tower.width, **options),
    "adapter": lambda tower, index, **options: Adapter(tower.width, **options),
    "lora": lambda tower, index, **options: Lora(tower.width, tower.hidden, **options),
    "ssf": lambda tower, index, **options: (
        Ssf(tower.width, tower.hidden, **options) if tower.attention else tower.make_ssf(index, **options)
    ),
    "vpt_shallow": lambda tower, index, **options: Prompt(tower.width, tower.patch_px, **options),
    "vpt_deep": lambda tower, index, **options: Prompt(tower.width, tower.patch_px, **options),
}
OWN: dict[str, Callable[[str, bool], bool]] = {  # (name, is it a norm's?) -> is it trained?
    "bitfit": lambda name, norm: name.endswith("bias"),
    "layernorm": lambda name, norm: norm,
    "batchnorm": lambda name, norm: norm,
    "full": lambda name, norm: True,
    "partial": lambda name, norm: True,
}
WITHOUT_BLOCKS = ("linear_probe", "zero_shot")
