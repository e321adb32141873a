"""Figures of a report as PNG files, drawn by kaleido and the local Chrome without network access."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lift_ray.errors import BadInput, RunFailed, one_line
from lift_ray.reporting.figures.charts import Figure

INK, SOFT, LINE = "#1c2128", "#57606a", "#d5dae0"  # the light theme of page.html
FONT = 'system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif'
WIDTH, HEIGHT = 800, 420


def on_paper(figure: Figure) -> dict[str, Any]:
    """Return the layout of a standalone figure on white, with the title and style that page.html adds on the page."""
    height = figure.layout.get("height", HEIGHT) + 50
    named = sum(1 for trace in figure.traces if trace.get("name") and trace.get("showlegend") is not False)
    return {
        "margin": {"l": 20, "r": 20, "t": 84 if named > 1 else 56, "b": 16},
        "hovermode": False,
        **figure.layout,
        "width": WIDTH,
        "height": height,
        "paper_bgcolor": "#fff",
        "plot_bgcolor": "#fff",
        "font": {"color": INK, "size": 13, "family": FONT},
        "title": {
            "text": figure.title,
            "font": {"size": 17},
            "x": 0.02,
            "xanchor": "left",
            "y": 1 - 24 / height,
            "yanchor": "middle",
        },
        "showlegend": named > 1,
        "legend": {
            "orientation": "h",
            "x": 0.01,
            "xref": "container",
            "y": 1 - 44 / height,
            "yref": "container",
            "yanchor": "top",
        },
        "annotations": [
            {"bgcolor": "#fff", "opacity": 0.85, "borderpad": 0, **a} for a in figure.layout.get("annotations", [])
        ],
        **{name: _axis(figure.layout.get(name, {})) for name in ("xaxis", "yaxis")},
    }


def _axis(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"gridcolor": LINE, "linecolor": LINE, "tickcolor": SOFT, "zeroline": False, **given}


def write_png(named: Sequence[tuple[str, Figure]], folder: Path) -> None:
    """Write folder/NAME.png for each figure.

    Raises:
        BadInput: kaleido or Chrome is missing.
        RunFailed: a figure cannot be drawn.
    """
    specs: list[dict[str, Any]] = [
        {
            "fig": {"data": figure.traces, "layout": on_paper(figure)},
            "path": folder / f"{name}.png",
            "opts": {"format": "png", "scale": 2},
        }
        for name, figure in named
    ]
    try:
        kaleido = import_module("kaleido")
        missing = import_module("kaleido.errors").ChromeNotFoundError
    except ImportError:
        raise BadInput(
            "--png",
            "requires the package kaleido",
            but="it is not installed or older than 1.5",
            remedy="pip install 'kaleido>=1.5', or omit --png",
        ) from None
    try:  # without MathJax, which kaleido would load from a server
        errors = kaleido.write_fig_from_object_sync(specs, kopts={"mathjax": False})
    except missing:
        raise BadInput(
            "--png",
            "requires Chrome or Chromium",
            but="found none",
            remedy="install one, set $BROWSER_PATH to it, or omit --png",
        ) from None
    except Exception as error:  # a Chrome that does not start: kaleido and its dependencies raise many kinds of errors
        errors = (error,)
    if errors:
        raise RunFailed(
            f"--png: must draw all figures, but {len(errors)} failed: {one_line(errors[0], 200)}; omit --png"
        )
