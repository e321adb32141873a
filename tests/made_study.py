"""Folder of a finished study, written without a search: made-up trials and made-up predictions for real images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lift_ray.data.open import open_dataset
from lift_ray.reporting.study_files import predictions_of
from lift_ray.storage.layout import PREDICTIONS_FILE

DATASET = "embedded:caltech101-lt"
KINDS = ("adaptformer", "lora", "linear_probe")
SPACE: dict[str, Any] = {
    "tuner.kind": {"choices": list(KINDS), "int": None, "float": None, "log": False, "step": None, "when": {}},
    "tuner.bottleneck": {
        "choices": None,
        "int": [2, 32],
        "float": None,
        "log": True,
        "step": None,
        "when": {"tuner.kind": ["adaptformer", "lora"]},
    },
    "loss.tau": {"choices": None, "int": None, "float": [0.0, 2.0], "log": False, "step": None, "when": {}},
    "optim.lr": {"choices": None, "int": None, "float": [0.01, 0.3], "log": True, "step": None, "when": {}},
}


def make_trials(number: int, **changes: Any) -> list[dict[str, Any]]:
    """Return rows as a search writes them. Mean class accuracy depends on tau only and is highest at 1."""
    random, rows = np.random.default_rng(0), []
    for i in range(number):
        kind, width, tau = KINDS[i % 3], int(2 ** random.integers(1, 6)), float(random.uniform(0, 2))
        value = 0.3 - 0.1 * (tau - 1) ** 2
        rows.append(
            {
                "number": i,
                "state": "pruned" if i % 5 == 4 else "finished",
                "epochs": 2,
                "tuner.kind": kind,
                "tuner.bottleneck": None if kind == "linear_probe" else width,
                "loss.tau": tau,
                "optim.lr": float(random.uniform(0.01, 0.3)),
                "train/images_per_s": 200.0,
                "validation/accuracy": value,
                "validation/mean_class_accuracy": value,
                "validation/many": 0.8 - 0.1 * tau,
                "validation/medium": value + 0.05,
                "validation/few": 0.1 * tau,
                "trained_parameters": 19_200 if kind == "linear_probe" else 19_200 + 3_000 * width,
                "train_s": 30.0,
                "evaluate_s": 3.0,
                "error": "",
                **changes,
            }
        )
    return rows


def write_study(
    folder: Path,
    trials: list[dict[str, Any]],
    *,
    objectives: dict[str, str] | None = None,
    fractions: tuple[float, ...] = (0.1, 0.4, 0.6),
) -> Path:
    """Write a finished study on real images.

    Args:
        fractions: fraction of the test images that each compared model classifies correctly.
    """
    data = open_dataset(DATASET)
    labels, random = data.split("test").labels, np.random.default_rng(1)
    luck, compared = random.random(len(labels)), []
    for i, (label, fraction) in enumerate(zip(("zero-shot", "the recipe", "best found"), fractions, strict=False)):
        predicted = np.where(luck < fraction, labels, (labels + 1) % data.num_classes)
        target = folder / predictions_of(f"model-{i}", 0)
        target.mkdir(parents=True)
        columns = {"label": labels, "predicted": predicted, "confidence": random.uniform(0.3, 1, len(labels))}
        pq.write_table(pa.table(columns), target / PREDICTIONS_FILE)
        hit = float((predicted == labels).mean())
        figures = dict.fromkeys(("accuracy", "mean_class_accuracy", "many", "medium", "few"), hit)
        compared.append(
            {
                "label": label,
                "predictions": target.name,
                **{f"{s}/{m}": v for s in ("validation", "test") for m, v in figures.items()},
            }
        )
    (folder / "best").mkdir()
    counts = data.split("train").class_counts(data.num_classes).tolist()
    (folder / "best" / "run.json").write_text(
        json.dumps({"class_names": list(data.class_names), "class_counts": counts})
    )
    best = max((t for t in trials if t["state"] == "finished"), key=lambda t: t["validation/mean_class_accuracy"])
    curve = [
        {"tau": tau, **{f"validation/{m}": 0.3 - 0.1 * tau for m in ("mean_class_accuracy", "many", "few")}}
        for tau in (0.0, 0.5, 1.0)
    ]
    about = {
        "name": "study",
        "dataset": data.uri,
        "compared": compared,
        "best": {"trial": best["number"]},
        "posthoc_curve": curve,
        "space": {"objectives": objectives or {"validation/mean_class_accuracy": "max"}, "space": SPACE, "scale": {}},
        "time_s": {"total": 200.0, "final comparison": 8.0},
        "machine": {"nodes": [{"CPU": 2.0}]},
    }
    (folder / "study.json").write_text(json.dumps(about))
    pq.write_table(pa.Table.from_pylist(trials), folder / "trials.parquet")
    return folder
