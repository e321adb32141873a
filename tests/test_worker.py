"""The worker of a slot, in this process and without Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from lift_ray.data.folds import EVERYTHING, Folds
from lift_ray.data.open import open_dataset
from lift_ray.ray_runtime.capacity import Need
from lift_ray.reporting.study_files import predictions_of
from lift_ray.searching.final_comparison import Model, evaluation_job
from lift_ray.searching.jobs import Job, SlotSettings, TrainJob, trial_checkpoint_path
from lift_ray.searching.worker import Worker
from lift_ray.settings.run import RunConfig
from lift_ray.storage.layout import PREDICTIONS_FILE
from lift_ray.storage.output import Output
from lift_ray.training.checkpoint import load_weights
from lift_ray.training.events import JobDone, Reply
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

FOLDS = Folds(3, train_on_separate=True)


def replies(worker: Worker, job: Job) -> list[Reply]:
    """Do a job to its end."""
    worker.begin(job)
    out = [worker.next(60)]
    while not isinstance(out[-1], JobDone):
        out.append(worker.next(60))
    return out


def test_a_refitted_model_is_tested_with_the_prior_of_the_images_it_was_trained_on(
    small_data: str, small_clip: str, tmp_path: Path
) -> None:
    config = RunConfig.model_validate(
        {
            "backbone": {"model": small_clip},
            "augment": {"kind": "none"},
            "tuner": {"kind": "linear_probe"},
            "optim": {"epochs": 1, "global_batch_size": 16, "lr": 0.1},
        }
    )
    worker, plain = Worker(SlotSettings(small_data, Need(1, 1, 0), str(tmp_path), "s", folds=FOLDS)), config.to_dict()
    refit = TrainJob(3, plain, EVERYTHING, then="keep")
    replies(worker, refit)
    path = trial_checkpoint_path(3, 1, EVERYTHING)
    replies(worker, evaluation_job(Model("trial-0003-refit", plain, path, refit), "test", [2.0]))
    written = pq.read_table(tmp_path / predictions_of("trial-0003-refit", 2.0) / PREDICTIONS_FILE)

    whole = open_dataset(small_data)
    everything = FOLDS.view(whole, EVERYTHING)
    run = Run(config, Workspace(everything, worker._view(EVERYTHING).ranks))
    with Output(str(tmp_path)).fetched(path) as folder:
        load_weights(folder, run.predictor)
    logits = np.concatenate([batch.logits.detach().numpy() for batch in run.predictor.logits(whole.split("test"))])

    def confidence(counts: np.ndarray) -> np.ndarray:
        adjusted = np.exp(logits) / (counts / counts.sum()) ** 2
        return np.asarray((adjusted / adjusted.sum(1, keepdims=True)).max(1))

    found = written["confidence"].to_numpy()
    np.testing.assert_allclose(found, confidence(everything.splits["train"].class_counts(8)), rtol=1e-4)
    assert np.abs(found - confidence(whole.splits["train"].class_counts(8))).max() > 0.01
