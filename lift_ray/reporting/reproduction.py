"""Published values beside measured ones: which claims there are, what counts as reproduced, and the page."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from lift_ray.reporting.confidence import student
from lift_ray.reporting.templates import template
from lift_ray.reporting.trial_rows import write_json
from lift_ray.storage.atomic import replacing
from lift_ray.storage.layout import REPRODUCTION
from lift_ray.storage.output import Output

NOT_VERIFIED = "not verified (stand-in)"
STAND_IN = (
    "STAND-IN: the embedded images and lift-small stand in for each dataset and model, with few steps. "
    "This shows that the command works; it verifies no claim."
)
HEADINGS = (
    *("Dataset", "Model", "Method", "Metric (%)", "Claimed", "Measured (interval)", "Difference"),
    *("Status", "Source", "Recipe", "Slot hours"),
)


@dataclass(frozen=True)
class Claim:
    """A published value.

    Attributes:
        table: the table it is part of: its dataset, whatever its imbalance.
        dataset: name of the dataset.
        model, method: what was trained.
        metric: accuracy, or that of a group of classes.
        value: percent.
        tte: with test-time ensembling.
        source: arXiv number, or who says so.
        second_hand: the source quotes or repeats the work of others.
        recipe: name of the run file; None if there is none, and then `note` says why.
        note: remark.
    """

    table: str
    dataset: str
    model: str
    method: str
    metric: str
    value: float
    tte: bool
    source: str
    second_hand: bool
    recipe: str | None
    note: str

    @property
    def measure(self) -> str:
        """The metric in words."""
        return f"{self.metric}{', TTE' if self.tte else ''}"

    @property
    def origin(self) -> str:
        """The source in words."""
        source = f"arXiv {self.source}" if self.source[:1].isdigit() else self.source
        return f"{source}{', second-hand' if self.second_hand else ''}"


@dataclass(frozen=True)
class PublishedData:
    """A published dataset.

    Attributes:
        training_images: its number of training images.
        command: the words of `lift-ray` that convert it; `{folder}` is where to.
    """

    training_images: int
    command: str


@cache
def claims() -> tuple[Claim, ...]:
    """Return all claims, in the order of the page."""
    return tuple(Claim(**claim) for claim in _content()["claims"])


@cache
def published_data() -> dict[str, PublishedData]:
    """Return the published datasets of the recipes by name."""
    return {name: PublishedData(**about) for name, about in _content()["datasets"].items()}


def _content() -> Any:
    return json.loads((files("lift_ray.reporting") / "claims.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Measured:
    """Claim with the values that were measured for it.

    Attributes:
        claim: the claim.
        values: percent of each seed that is done.
        seeds: number of seeds that were asked for.
        seconds: time of slots for training and testing.
        stand_in: embedded data and model stood in for the published ones.
        problem: why no value can come; "" otherwise.
    """

    claim: Claim
    values: tuple[float, ...] = ()
    seeds: int = 0
    seconds: float = 0.0
    stand_in: bool = False
    problem: str = ""

    @property
    def mean(self) -> float | None:
        """The mean over seeds; None without a value."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def half_width(self) -> float | None:
        """Half of the 95% prediction interval for one more run (Student's t); None with fewer than two seeds.

        The published value is such a run. It varies too, so a confidence interval of the mean would be too narrow.
        """
        number = len(self.values)
        if number < 2:
            return None
        return student(number - 1) * statistics.stdev(self.values) * math.sqrt(1 + 1 / number)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Ends of the prediction interval, within 0 and 100 because all that is measured is an accuracy; None without."""
        if self.mean is None or self.half_width is None:
            return None
        return max(0.0, self.mean - self.half_width), min(100.0, self.mean + self.half_width)

    @property
    def difference(self) -> float | None:
        """Measured minus claimed; None if there is none or it means nothing."""
        return None if self.mean is None or self.stand_in else self.mean - self.claim.value

    @property
    def status(self) -> str:
        """Verdict on the claim, in words."""
        if self.stand_in and self.claim.recipe is not None:
            return NOT_VERIFIED
        if self.problem:
            return self.problem
        if self.difference is None:
            return "not run"
        if len(self.values) < self.seeds:
            return f"not finished ({len(self.values)} of {self.seeds} seeds)"
        if self.half_width is None:
            return "not decided (one seed has no interval)"
        rounding = 0.5 * 10 ** -len(str(self.claim.value).partition(".")[2])
        if abs(self.difference) <= self.half_width + rounding:
            return "reproduced"
        return f"differs by {self.difference:+.1f}"

    def cells(self) -> tuple[str, ...]:
        """Return the texts of a row, as HEADINGS."""
        claim, shown = self.claim, "" if self.mean is None else f"{self.mean:.1f}"
        if self.interval is not None:
            shown += " ({:.1f} to {:.1f})".format(*self.interval)
        if self.mean is not None and self.stand_in:
            shown += " stand-in"
        return (
            *(claim.dataset, claim.model, claim.method, claim.measure, f"{claim.value:g}", shown),
            "" if self.difference is None else f"{self.difference:+.1f}",
            self.status + (f"; {self.problem}" if self.problem and self.problem != self.status else ""),
            claim.origin + (f"; {claim.note}" if claim.note else ""),
            claim.recipe or "",
            f"{self.seconds / 3600:.2f}" if self.seconds else "",
        )

    def for_json(self) -> dict[str, Any]:
        """Return everything about it, for JSON."""
        low, high = self.interval or (None, None)
        found = {"mean": self.mean, "low": low, "high": high, "difference": self.difference, "status": self.status}
        return {**asdict(self), **found}


def write_pages(rows: Sequence[Measured], about: Mapping[str, str], out: Output, *, stand_in: bool) -> str:
    """Write the comparison as page (HTML), Markdown and JSON into OUT, and return the name of the page.

    Args:
        rows: the claims.
        about: command, commit, versions, hardware and cost, by heading.
        stand_in: the values are of stand-ins, which every file says.
    """
    banner = STAND_IN if stand_in else ""
    table = [row.cells() for row in rows]
    write_json(
        {"stand_in": stand_in, "banner": banner, "about": dict(about), "claims": [row.for_json() for row in rows]},
        out.folder / f"{REPRODUCTION}.json",
    )
    lines = [_markdown(HEADINGS), _markdown(["---"] * len(HEADINGS)), *map(_markdown, table)]
    head = ["# Claimed and measured", *([f"**{banner}**"] if banner else []), "\n".join(lines)]
    facts = "\n".join(f"* {name}: {value}" for name, value in about.items())
    _write(out, f"{REPRODUCTION}.md", "\n\n".join([*head, facts]) + "\n")
    page = template("lift_ray.reporting", "reproduction.html").render(
        banner=banner, headings=HEADINGS, table=table, about=about
    )
    _write(out, f"{REPRODUCTION}.html", page)
    out.publish()
    return f"{REPRODUCTION}.html"


def _markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _write(out: Output, name: str, text: str) -> None:
    with replacing(out.folder / name) as temporary:
        temporary.write_text(text, encoding="utf-8")
