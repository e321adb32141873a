"""Search spaces as Python objects."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lift_ray.errors import BadInput
from lift_ray.settings.base import settings_given
from lift_ray.settings.checks import checked_space, read_space
from lift_ray.settings.run import RunConfig
from lift_ray.settings.space import SpaceFile
from lift_ray.settings.yaml_file import SettingsFile

NO_DATASET = "(none)"  # while a space has none


class SearchSpace:
    """Search space with its baselines and the settings of the search: the content of a search-space file (docs/how-to/space-file.md).

    Args:
        space: range of each searched setting, as {"loss.tau": {"float": [0.5, 2.0]}, "tuner.kind": {"choices": ["lora", "adapter"]}}.
        base: settings of every trial.
        baselines: settings to compare with, by dotted name; `name` is the label in tables.
        name: name of the search.
        dataset: path or URI of the dataset; None if it is given to `search`.
        sections: other sections of a file, by name: objectives, constraints, search, scale, test.

    Raises BadInput with a line for each problem.
    """

    def __init__(
        self,
        space: Mapping[str, Any],
        *,
        base: RunConfig | Mapping[str, Any] | None = None,
        baselines: Sequence[Mapping[str, Any]] = (),
        name: str = "search",
        dataset: str | None = None,
        **sections: Any,
    ) -> None:
        if unknown := sections.keys() - SpaceFile.model_fields.keys():
            known = ", ".join(SpaceFile.model_fields.keys() - {"space", "base", "baselines", "name", "dataset"})
            raise BadInput("SearchSpace", f"unknown section '{min(unknown)}'", remedy=f"known: {known}")
        tree = {
            "name": name,
            "dataset": dataset or NO_DATASET,
            "base": settings_given(base) if isinstance(base, RunConfig) else dict(base or {}),
            "space": {key: dict(value) for key, value in space.items()},
            "baselines": [dict(baseline) for baseline in baselines],
            **sections,
        }
        self.file = checked_space(SettingsFile("SearchSpace", tree, {}, first_line=0))

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None) -> SearchSpace:
        """Read a search-space file.

        Args:
            settings: settings to change, by dotted name, as {"search.trials": 30}.

        Raises BadInput with a line for each problem.
        """
        one = cls.__new__(cls)
        one.file = read_space(os.fspath(path), dict(settings or {}))
        return one

    def on(self, dataset: str | None) -> SpaceFile:
        """Return the space on a dataset; None for its own. Raises BadInput if there is none."""
        if dataset is None and self.file.dataset == NO_DATASET:
            raise BadInput("data", "is required, because the space names no dataset", but="is missing")
        return self.file if dataset is None else self.file.model_copy(update={"dataset": dataset})
