"""Each figure of a report as a PNG, drawn by kaleido and the Chrome of this machine, without network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lift_ray.errors import BadInput, RunFailed
from lift_ray.reporting.figures.charts import Figure

INK, SOFT, LINE = "#1c2128", "#57606a", "#d5dae0"  # as in page.html, in light
FONT = 'system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif'
WIDTH, HEIGHT = 800, 420


def on_paper(figure: Figure) -> dict[str, Any]:
    """The layout of a figure that stands alone: what the page's script and heading add, on white."""
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
    """folder/NAME.png of each figure.

    Raises:
        BadInput: kaleido or a Chrome is missing.
        RunFailed: one cannot be drawn.
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
            "--png: needs the package kaleido, but it is not installed or older than 1.5; pip install 'kaleido>=1.5', "
            "or leave out --png"
        ) from None
    try:  # MathJax would come from a server
        errors = kaleido.write_fig_from_object_sync(specs, kopts={"mathjax": False})
    except missing:
        raise BadInput(
            "--png: needs Chrome or Chromium, but finds none; install one, name it in $BROWSER_PATH, or leave out --png"
        ) from None
    except Exception as error:  # a Chrome that does not start: kaleido and what it stands on raise many kinds
        errors = (error,)
    if errors:
        text = " ".join(str(errors[0]).split())[:200] or type(errors[0]).__name__
        raise RunFailed(f"--png: all figures must be drawn, but {len(errors)} were not: {text}; leave out --png")
