"""Folder of a finished study, written without a search: made-up trials and made-up predictions for real images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lift_ray.data.dataset import Dataset
from lift_ray.data.open import open_dataset
from lift_ray.evaluation.metrics import PUBLISHED, ClassGroups
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


def with_folds(folder: Path, **changes: Any) -> Path:
    """Add to a study what a search with folds, confirmation and refit writes: four folds of made-up out-of-fold predictions.

    The first two classes are confused most: a third of the first class is predicted as the second.

    Args:
        changes: entries of study.json to replace.
    """
    record = json.loads((folder / "best" / "run.json").read_text())
    counts, random = np.array(record["class_counts"]), np.random.default_rng(2)
    num_classes = len(counts)
    label = np.repeat(np.arange(num_classes), np.minimum(counts, 30))
    predicted = np.where(random.random(len(label)) < 0.5, label, random.integers(0, num_classes, len(label)))
    predicted[np.flatnonzero(label == 0)[::3]] = 1
    columns = {
        "path": pa.array([f"images/{i}.jpg" for i in range(len(label))]),
        "label": pa.array(label, pa.int32()),
        "fold": pa.array(np.arange(len(label)) % 4 + 1, pa.int32()),
        "predicted": pa.array(predicted, pa.int32()),
        "confidence": pa.array(random.uniform(0.3, 1, len(label)), pa.float32()),
        "logits": pa.array(list(random.normal(size=(len(label), num_classes))), pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(columns), folder / "best" / "out_of_fold.parquet")
    about = json.loads((folder / "study.json").read_text())
    trial = about["best"]["trial"]
    candidates = [
        {"trial": trial, "label": f"trial {trial}", "tau": 0.5, "value": 0.41, "trained_parameters": 22_000},
        {"trial": 5, "label": "trial 5", "tau": 0.0, "value": 0.402, "trained_parameters": 50_000},
        {"trial": 0, "label": "the recipe", "tau": 0.0, "value": 0.35, "trained_parameters": 19_200},
    ]
    errors = (0.0, 0.012, 0.02)
    for one, error in zip(candidates, errors, strict=True):
        one |= {"difference": one["value"] - 0.41, "error": error}
    about |= {
        "choice": {
            "trial": trial,
            "tau": 0.5,
            "baseline": None,
            "metric": "validation/mean_class_accuracy",
            "mode": "max",
            "value": 0.41,
            "folds": 4,
            "images": len(label),
            "prefer": "best",
            "candidates": candidates,
        },
        "posthoc": {
            "tau": 0.5,
            "gain": 0.02,
            "bias": 0.007,
            "recommended": True,
            "metric": "validation/mean_class_accuracy",
        },
        "posthoc_curve": [
            {"tau": tau, **{f"validation/{m}": 0.41 - 0.04 * abs(tau - 0.5) for m in ("mean_class_accuracy", "few")}}
            for tau in (0.0, 0.5, 1.0)
        ],
        "out_of_fold": {
            f"validation/{m}": v
            for m, v in accuracies(label, predicted, ClassGroups.of(counts, PUBLISHED).names).items()
        },
        "refit": {"data": "train+validation", "retrained": True, "images": 3100},
        "unseen": ["yin yang"],
        "groups": {
            "names": ClassGroups.of(counts, PUBLISHED).names.tolist(),
            "few_below": 20,
            "many_above": 100,
            "note": "",
        },
        "held_out": True,
        **changes,
    }
    (folder / "study.json").write_text(json.dumps(about))
    return folder


def accuracies(label: Any, predicted: Any, groups: Any) -> dict[str, float]:
    """Overall, mean class and group accuracy."""
    total = np.bincount(label, minlength=len(groups))
    each = np.bincount(label[label == predicted], minlength=len(groups)) / np.maximum(total, 1)
    by_group = {name: float(each[(total > 0) & (groups == name)].mean()) for name in ("many", "medium", "few")}
    return {
        "accuracy": float((label == predicted).mean()),
        "mean_class_accuracy": float(each[total > 0].mean()),
        **by_group,
    }


def write_study(
    folder: Path,
    trials: list[dict[str, Any]],
    *,
    objectives: dict[str, str] | None = None,
    fractions: tuple[float, ...] = (0.1, 0.4, 0.6),
    data: Dataset | None = None,
) -> Path:
    """Write a finished study on real images.

    Args:
        data: a dataset of others, or of none: then the report has no examples.
        fractions: fraction of the test images that each compared model classifies correctly.
    """
    data = data or open_dataset(DATASET)
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
