"""The files with the result of a search: study.json, best.yaml and best/."""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import lift_ray
from lift_ray.data.dataset import Dataset
from lift_ray.data.paths import image_paths
from lift_ray.epoch_metrics import named
from lift_ray.evaluation.metrics import per_class_rows, write_per_class
from lift_ray.ray_runtime.session import machine
from lift_ray.reporting.study_files import BEST_FOUND
from lift_ray.reporting.trial_rows import TrialRow, write_json
from lift_ray.searching.confirmation import Choice
from lift_ray.searching.final_comparison import Model, SearchResult, trained
from lift_ray.searching.predictions import files_of, logits_name
from lift_ray.searching.search_data import SearchData
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.settings.space import SpaceFile
from lift_ray.settings.yaml_file import dump_yaml
from lift_ray.storage.atomic import replacing
from lift_ray.storage.layout import BEST, BEST_METRICS, BEST_SETTINGS, OUT_OF_FOLD_FILE, PER_CLASS, RECORD, STUDY
from lift_ray.storage.output import Output
from lift_ray.training.checkpoint import Record, read_record

ROWS = 1024  # images that are copied at a time


def write_result(space: SpaceFile, dataset: Dataset, data: SearchData, found: SearchResult, out: Output) -> None:
    """Write best/, best.yaml and study.json. study.json is written last: if it exists, the search is done."""
    choice, figures = found.choice, dict(found.compared)[BEST_FOUND]
    with _best_folder(out, found.final, choice.posthoc.tau, figures) as folder:
        write_out_of_fold(folder / OUT_OF_FOLD_FILE, choice, dataset, data, out)
        write_per_class(_per_class(folder, choice), folder / PER_CLASS)
    record = _write_best_settings(space, dataset.uri, data.train_on if found.final.refit else "train", out)
    about: dict[str, Any] = {
        "name": space.name,
        "dataset": dataset.uri,
        "space": space.model_dump(mode="json", by_alias=True),
        "best": {
            "trial": choice.row.number,
            "values": choice.row.values,
            "digest": record.digest,
            "config": record.config,
        },
        "choice": choice_for_json(space, choice),
        "out_of_fold": named("validation", choice.figures),
        "refit": {
            "data": data.train_on if found.final.refit else "train",
            "retrained": found.final.refit is not None,
            "images": data.final_images if found.final.refit else data.num_images["train"],
        },
        "unseen": list(data.unseen),
        "groups": {
            "names": data.groups.names.tolist(),
            "few_below": data.groups.few_below,
            "many_above": data.groups.many_above,
            "note": data.groups.note,
        },
        "held_out": space.test == "split",
        "posthoc": {
            "tau": choice.posthoc.best,
            "gain": choice.posthoc.gain,
            "bias": choice.posthoc.bias,
            "recommended": choice.posthoc.is_recommended,
            "metric": f"validation/{choice.metric}",
        },
        "posthoc_curve": [
            {"tau": at["tau"], **named("validation", {name: at[name] for name in at if name != "tau"})}
            for at in choice.curve
        ],
        "compared": [{"label": label, **figures} for label, figures in found.compared],
        "tte": found.tte,
        "seeds": found.seeds,
        "together": found.together,
        "pareto": [
            {"trial": row.number, "values": row.values, **{m: row.last[m] for m in space.objectives}}
            for row in found.front
        ],
        "time_s": {name: round(seconds, 2) for name, seconds in found.time_s.items()},
        "versions": {
            "lift_ray": lift_ray.__version__,
            "ray": version("ray"),
            "optuna": version("optuna"),
            "python": platform.python_version(),
        },
        "machine": machine(),
    }
    write_json(about, out.folder / STUDY)
    out.publish()


def _per_class(folder: Path, choice: Choice) -> list[dict[str, Any]]:
    """Return the row of each class in a table of the winner's out-of-fold predictions."""
    record = read_record(folder)
    found = choice.predictions.at(choice.posthoc.tau)
    hits = found.label[found.label == found.predicted]
    counts = [
        np.bincount(classes, minlength=len(record.class_names)) for classes in (hits, found.label, found.predicted)
    ]
    return per_class_rows(record.class_names, np.array(record.class_counts), record.groups.names, *counts)


def label_of(space: SpaceFile, row: TrialRow) -> str:
    """Return the name of a trial in tables: that of its baseline, or its number."""
    return f"trial {row.number}" if row.baseline is None else space.baseline_labels()[row.baseline]


def choice_for_json(space: SpaceFile, choice: Choice) -> dict[str, Any]:
    """Return the winner and the trials it was compared with."""
    winner, search = choice.candidates[0], space.search
    return {
        "trial": winner.row.number,
        "tau": winner.posthoc.tau,
        "baseline": None if winner.row.baseline is None else label_of(space, winner.row),
        "metric": f"validation/{choice.metric}",
        "mode": choice.mode,
        "value": winner.value,
        "folds": search.folds,
        "images": choice.num_images,
        "prefer": search.confirm.prefer if search.confirm else "best",
        "candidates": [
            {
                "trial": one.row.number,
                "label": label_of(space, one.row),
                "tau": one.posthoc.tau,
                "value": one.value,
                "trained_parameters": one.row.last.trained_parameters,
                "difference": one.difference,
                "error": one.error if math.isfinite(one.error) else None,
            }
            for one in choice.candidates
        ],
    }


def write_best_so_far(space: SpaceFile, dataset: str, best: TrialRow, out: Output) -> None:
    """Write best/ and best.yaml of a search that stops before its end."""
    model = trained(space, best)
    with _best_folder(out, model, model.tau, best.last.flat("validation")):
        pass
    _write_best_settings(space, dataset, "train", out)


def _write_best_settings(space: SpaceFile, dataset: str, train_on: str, out: Output) -> Record:
    """Write best.yaml, the settings of best/, and return their record."""
    record = read_record(out.folder / BEST)
    header = f"# Best of the search {space.name}; python -m lift_ray.train best.yaml trains it again.\n"
    data = {"dataset": dataset} | ({} if train_on == "train" else {"train_on": train_on})
    dump_yaml({"name": f"{space.name}-best", **data, **record.config}, out.folder / BEST_SETTINGS, header)
    out.publish()
    return record


@contextmanager
def _best_folder(out: Output, model: Model, tau: float, figures: Mapping[str, Any]) -> Iterator[Path]:
    """Copy a model's checkpoint to best/, with a post-hoc tau in its settings; yield the folder before it gets its name."""
    target, temporary = out.folder / BEST, out.folder / f"{BEST}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    assert model.checkpoint is not None
    with out.fetched(model.checkpoint) as folder:
        shutil.copytree(folder, temporary)
    record = json.loads((temporary / RECORD).read_text())
    if record["config"]["evaluation"]["posthoc_tau"] != tau:
        config = RunConfig.model_validate(apply_overrides(record["config"], {"evaluation.posthoc_tau": tau}, RunConfig))
        write_json({**record, "config": config.to_dict(), "digest": config.digest()}, temporary / RECORD)
    kept = {name: value for name, value in figures.items() if name != "predictions"}
    write_json(kept, temporary / BEST_METRICS)
    yield temporary
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)


def write_out_of_fold(path: Path, choice: Choice, dataset: Dataset, data: SearchData, out: Output) -> None:
    """Write the winner's out-of-fold predictions: path, label, fold, predicted class and its probability, and raw logits.

    Raises RunFailed if the storage fails, and BadInput if the paths of the images cannot be read.
    """
    schema = pa.schema(
        {
            "path": pa.string(),
            "label": pa.int32(),
            "fold": pa.int32(),
            "predicted": pa.int32(),
            "confidence": pa.float32(),
            "logits": pa.list_(pa.float32()),
        }
    )
    measured = choice.predictions.at(choice.posthoc.tau)
    splits = [data.folds.view(dataset, fold).splits["validation"] for fold in range(1, len(choice.parts) + 1)]
    paths = [path for split, parts in zip(splits, choice.parts, strict=True) if parts for path in image_paths(split)]
    at = 0
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for _, _, name in files_of(choice.row.number, choice.parts, logits_name):
            with out.fetched(name) as file:
                # Not at once: the logits of thousands of classes are many GB.
                for batch in pq.ParquetFile(file).iter_batches(ROWS):
                    here = slice(at, at + len(batch))
                    columns = {
                        "path": paths[here],
                        "label": measured.label[here],
                        "fold": choice.predictions.fold[here],
                        "predicted": measured.predicted[here],
                        "confidence": measured.confidence[here],
                        "logits": batch["logits"].cast(schema.field("logits").type),
                    }
                    writer.write_table(pa.table({key: pa.array(value) for key, value in columns.items()}).cast(schema))
                    at = here.stop
