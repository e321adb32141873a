"""A run inside a search: its last validation also says what other post-hoc taus would give."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lift_ray.data.dataset import Split
from lift_ray.data.order import rank_slice
from lift_ray.evaluation.accumulator import TauGrid, halves_of
from lift_ray.settings.search import TAUS
from lift_ray.training.run import Figures, Run


class Trial(Run):
    """A run whose last epoch's figures hold validation/posthoc_...: the logits of its validation are looked at once more."""

    grid: TauGrid | None = None

    def end_epoch(self) -> Figures:
        """As of a run; after the last epoch with the post-hoc figures."""
        self._open_grid(self.epoch + 1 == self.num_epochs)
        return self._with_posthoc(super().end_epoch())

    def validate_untrained(self) -> Figures:
        """As of a run, with the post-hoc figures."""
        self._open_grid(True)
        return self._with_posthoc(super().validate_untrained())

    def _open_grid(self, wanted: bool) -> None:
        self.grid = TauGrid(TAUS, self.class_counts, self.ranks.device) if wanted else None

    def _with_posthoc(self, figures: Figures) -> Figures:
        if self.grid is None:
            return figures
        for tensor in self.grid.tensors():
            self.ranks.sum(tensor)
        figures |= {f"validation/{name}": value for name, value in self.grid.result().items()}
        self.grid = None
        return figures

    def _logits(self, split: Split) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        mine = rank_slice(split.num_samples, self.ranks.rank, self.ranks.world_size)
        at, halves = mine.start, torch.from_numpy(halves_of(split.labels)).to(self.ranks.device)
        for logits, labels in super()._logits(split):
            if self.grid is not None:
                self.grid.add(logits, labels, halves[at : at + len(labels)])
            at += len(labels)
            yield logits, labels
