"""Checks of the Prometheus and Grafana files that come with the cluster files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lift_ray.clusters.diagnostics import Diagnostics, Place, walk
from lift_ray.clusters.schemas import TEXT, Schema, listed, mapping
from lift_ray.errors import did_you_mean
from lift_ray.settings.yaml_file import SettingsFile
from lift_ray.text import count

DURATION: Schema = {"type": "string", "pattern": r"^\d+(ms|s|m|h)$"}
PROMETHEUS = mapping(
    "scrape_configs",
    **{"global": mapping("", scrape_interval=DURATION, evaluation_interval=DURATION, scrape_timeout=DURATION)},
    scrape_configs=listed(
        mapping(
            "job_name file_sd_configs",
            job_name=TEXT,
            scrape_interval=DURATION,
            scrape_timeout=DURATION,
            file_sd_configs=listed(mapping("files", files=listed(TEXT), refresh_interval=DURATION)),
        )
    )
    | {"minItems": 1},
)


def is_monitoring(data: dict[str, Any]) -> bool:
    """Return True for a file for Prometheus or Grafana, False for one of a cluster."""
    return bool({"scrape_configs", "panels"} & data.keys())


def check_monitoring(file: SettingsFile) -> str:
    """Check a file and return a summary of it. Raises BadInput with a line for each fault."""
    faults = Diagnostics(file)
    said = _prometheus(faults) if "scrape_configs" in file.data else _grafana(faults)
    faults.end()
    return f"{file.source} ({said})"


def _prometheus(faults: Diagnostics) -> str:
    """Check that every job scrapes the list of nodes that Ray maintains."""
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    faults.by_schema(PROMETHEUS)
    faults.end()  # the checks below rely on the types
    jobs = faults.file.data["scrape_configs"]
    for i, job in enumerate(jobs):
        for j, source in enumerate(job["file_sd_configs"]):
            if not any(name.endswith(f"/{PROMETHEUS_SERVICE_DISCOVERY_FILE}") for name in source["files"]):
                place: Place = ("scrape_configs", i, "file_sd_configs", j, "files")
                faults.add(
                    place,
                    "must contain Ray's list of nodes",
                    source["files"],
                    f"write /tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}",
                )
    return f"Prometheus, jobs {', '.join(job['job_name'] for job in jobs)}"


def _grafana(faults: Diagnostics) -> str:
    """Check that every panel queries metrics that exist."""
    known = published()
    for place, text in walk(faults.file.data):
        if place[-1] in ("expr", "query"):
            for name in sorted(set(re.findall(r"\bray_\w+", text)) - known):
                faults.add(place, f"unknown metric '{name}'", remedy=did_you_mean(name, known))
    panels = faults.file.data["panels"]
    for i, panel in enumerate(panels if isinstance(panels, list) else []):
        if not isinstance(panel, dict) or not panel.get("title") or not panel.get("targets"):
            faults.add(("panels", i), "must have a title and targets", but="it does not", remedy="add them")
    return f"Grafana, {count(len(panels), 'panel')}"


def published() -> set[str]:
    """Return the Prometheus names of all metrics that a search, a run and Ray's nodes export."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    from lift_ray.tracking.prometheus import SLOT_GAUGES, STUDY_GAUGES
    from lift_ray.training.progress import STEP_FIGURES

    ours: dict[str, Iterable[str]] = {"study": STUDY_GAUGES, "study_slot": SLOT_GAUGES, "train": STEP_FIGURES}
    return {f"ray_lift_ray_{of}_{name}" for of, names in ours.items() for name in names} | {
        f"ray_{name}" for name in METRICS_GAUGES
    }
