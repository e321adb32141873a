"""A study that has finished, read from its result folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lift_ray.errors import BadInput
from lift_ray.reporting.report import write_report
from lift_ray.reporting.study_files import BEST_FOUND
from lift_ray.settings.run import RunConfig
from lift_ray.storage.layout import BEST, STUDY, TRIALS
from lift_ray.storage.output import Output

if TYPE_CHECKING:
    import pandas as pd

    from lift_ray.inference.classifier import Classifier


@dataclass(frozen=True)
class Best:
    """The best settings of a search.

    Attributes:
        config: all settings of the model in OUT/best.
        values: the searched ones, by dotted name.
        trial: number of the trial.
        baseline: label of the baseline that won; None if the search found something better.
        metrics: test metrics by name; those of validation if there is no test split.
    """

    config: RunConfig
    values: dict[str, Any]
    trial: int
    baseline: str | None
    metrics: dict[str, float]


class FinishedStudy:
    """Result of a search, in its folder.

    Args:
        out: folder or URL of the results.

    Raises BadInput if there is no finished search.
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self._output = Output(os.fspath(out), "OUT")
        if not self._output.holds(STUDY):
            raise BadInput(
                self._output.shown,
                "must hold a finished search",
                but=f"there is no {STUDY}",
                remedy="check the path, or continue the search",
            )

    def __repr__(self) -> str:
        return f"FinishedStudy({self._output.shown!r})"

    @property
    def out(self) -> str:
        """Folder or URL of the results."""
        return self._output.url

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of study.json (docs/reference/files.md)."""
        with self._output.fetched(STUDY) as path:
            found: dict[str, Any] = json.loads(Path(path).read_text())
        return found

    @cached_property
    def best(self) -> Best:
        """The best settings, and the metrics of the model with them."""
        found, split = self.summary, "test" if self.summary["held_out"] else "validation"
        figures = next(row for row in found["compared"] if row["label"] == BEST_FOUND)
        return Best(
            RunConfig.model_validate(found["best"]["config"]),
            found["best"]["values"],
            found["best"]["trial"],
            found["choice"]["baseline"],
            {name.removeprefix(f"{split}/"): value for name, value in figures.items() if name.startswith(f"{split}/")},
        )

    def comparison(self) -> pd.DataFrame:
        """Return the models that were compared, one in a row: `label`, and metrics as `test/few`, as fractions."""
        import pandas as pd

        return pd.DataFrame(self.summary["compared"]).set_index("label")

    def trials_dataframe(self) -> pd.DataFrame:
        """Return the table of trials, as in trials.parquet."""
        frame: pd.DataFrame = self._output.table(TRIALS).to_pandas()
        return frame

    def classifier(self, **options: Any) -> Classifier:
        """Return the best model. Options as in `Classifier.load`."""
        from lift_ray.inference.classifier import Classifier  # loads torch, which the driver of a search does without

        return Classifier.load(f"{self.out}/{BEST}", **options)

    def report(self) -> str:
        """Write the report page again, and return its path or URL."""
        return write_report([self.out])
