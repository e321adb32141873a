"""The small trained parts of a frozen tower: the places that a tuner may change, the tuners of all blocks, and those behind.

Most kinds are one BlockTuner for each tuned block: the block asks it at fixed places, and a tuner overrides the places it
changes. Parameter names in a checkpoint are `<tuner>.<block>.<parameter>`. Other kinds train parameters that the tower
has already (`own_names`), or a few of their values (`Sparse`), or are a module behind the tower (`behind.<tuner>.<parameter>`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from lift_ray.registry import TUNERS, imported

if TYPE_CHECKING:
    from lift_ray.model.tower import SharedWeights

AnyTower = TypeVar("AnyTower", bound="SharedWeights")


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

    can_merge = False  # a kind whose change is one of the block's weights says so, and has a `merge_into`

    def merge_into(self, block: Any) -> None:
        """Change the block's weights so that it computes without this tuner what it does with it."""
        raise NotImplementedError(type(self).__name__)

    def conv(self, index: int, x: Tensor) -> Tensor:
        """A residual block's convolution 0 ... 3 after its norm, 3 on the shortcut: (B, C, H, W) of those channels."""
        return x


class Identity(BlockTuner):
    """For blocks without a tuner."""

    can_merge = True

    def merge_into(self, block: Any) -> None:
        """Nothing to do."""


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


class Both(BlockTuner):
    """Two tuners of one block: at each place the first, then the second."""

    def __init__(self, first: BlockTuner, second: BlockTuner) -> None:
        super().__init__()
        self.parts = [first, second]  # a plain list: both are registered in the Tuner already
        self.can_merge = first.can_merge and second.can_merge

    def merge_into(self, block: Any) -> None:
        """See BlockTuner."""
        for part in self.parts:
            part.merge_into(block)

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


def own_names(tower: nn.Module, trains: Callable[[str, bool], bool], blocks: Sequence[int]) -> list[str]:
    """Names of the tower's own parameters in these blocks that a kind trains (TunerKind.trains)."""
    inside = [n for n, _ in tower.named_parameters() if n.startswith("blocks.") and int(n.split(".")[1]) in blocks]
    # FastViT has a few layer norms beside its batch norms, which are what `batchnorm` names
    has_batch_norms = any(isinstance(m, nn.BatchNorm2d) for m in tower.modules())
    sorts: tuple[type[nn.Module], ...] = (nn.BatchNorm2d,) if has_batch_norms else (nn.LayerNorm, nn.RMSNorm)
    norms = {n for n, m in tower.named_modules() if isinstance(m, sorts)}
    return [name for name in inside if trains(name, name.rpartition(".")[0] in norms)]


def with_own_weights(tower: AnyTower, parts: dict[str, dict[str, Any]], also: Sequence[str] = ()) -> AnyTower:
    """The tower with parameters of its own wherever these kinds train the tower's; the tower itself if they train none.

    Args:
        tower: a model.tower.SharedWeights, which never changes.
        parts: options of each kind of tuner, as in `Tuner`. Of kinds that train the tower's own parameters there is one at most.
        also: names of other parameters to train.
    """
    for kind, options in parts.items():
        known = TUNERS[kind]
        if known.trains:
            return tower.with_own([*own_names(tower, known.trains, options["blocks"]), *also])
        if known.prepare:
            own = tower.with_own(also)
            imported(known.prepare)(own, **options)
            return own
    return tower.with_own(also) if also else tower


def first_block(kind: str, options: dict[str, Any], num_blocks: int) -> int:
    """The first block that a kind changes; `num_blocks` when it changes none."""
    return int(min(options.get("blocks") or [0])) if TUNERS[kind].changes_tower else num_blocks


class Tuner(nn.Module):
    """The tuners of all blocks, one for each tuned block and Identity elsewhere, and what is behind the tower.

    `behind` maps features (B, D) to the classifier's input (B, D): the modules of the kinds that have one, in the order given.

    Args:
        parts: options of each kind: the arguments of its `build`, and `blocks`; or those of its `behind`. Other kinds are ignored.
        tower: where they go; each kind says which of its sizes it uses.
    """

    def __init__(self, parts: dict[str, dict[str, Any]], tower: Any) -> None:
        super().__init__()
        self.per_block: list[BlockTuner] = [_IDENTITY] * tower.num_blocks
        self.behind = nn.Sequential()
        for kind, given in parts.items():
            options = dict(given)
            if behind := TUNERS[kind].behind:
                self.behind.add_module(kind, imported(behind)(tower, **options))
            blocks = options.pop("blocks", None) or [0]
            if not TUNERS[kind].build:
                continue
            tuned = {str(i): TUNERS.build(kind, tower, i, **_of_block(options, at)) for at, i in enumerate(blocks)}
            self.add_module(kind, nn.ModuleDict(tuned))
            for i in blocks:
                before = self.per_block[i]
                self.per_block[i] = tuned[str(i)] if before is _IDENTITY else Both(before, tuned[str(i)])


def _of_block(options: dict[str, Any], at: int) -> dict[str, Any]:
    """Options of one tuned block: of several bottlenecks, that of the `at`-th block."""
    widths = options.get("bottleneck")
    return options | {"bottleneck": widths[at]} if isinstance(widths, list) else options


_IDENTITY = Identity()
