"""The names of the files in OUT.

A search writes STUDY, SPACE, TRIALS, TRIALS_CSV, BEST_SETTINGS, BEST/, REPORT/, PREDICTIONS/, OUT_OF_FOLD/, CHECKPOINTS/, JOURNAL and
LOCK; a training run SETTINGS, METRICS and CHECKPOINTS/; `reproduce` REPRODUCTION and RESULTS. A checkpoint is a folder with RECORD,
WEIGHTS, PER_CLASS and, for resuming, OPTIMIZER and STATE.
"""

from __future__ import annotations

STUDY = "study.json"
SPACE = "space.json"  # the search space, written before the first trial
TRIALS, TRIALS_CSV = "trials.parquet", "trials.csv"
BEST, BEST_SETTINGS, BEST_METRICS = "best", "best.yaml", "metrics.json"
REPORT, PAGE = "report", "index.html"
PREDICTIONS, PREDICTIONS_FILE = "predictions", "test.parquet"
OUT_OF_FOLD, OUT_OF_FOLD_FILE = "out_of_fold", "out_of_fold.parquet"  # the file is next to the weights of best/
JOURNAL, LOCK = "optuna.journal", "driver.lock"

REPRODUCTION = "reproduction"  # of reproduction.html, .md and .json
RESULTS = "results.json"  # of the fixed runs of `reproduce`, by job

SETTINGS = "run.yaml"
METRICS = "metrics.jsonl"  # of each epoch of a training run, and at the end of the test split
TOGETHER = "together.json"
CHECKPOINTS, FINAL_CHECKPOINT = "checkpoints", "checkpoint"

RECORD, WEIGHTS, OPTIMIZER, STATE = "run.json", "weights.safetensors", "optimizer.safetensors", "state.safetensors"
PER_CLASS = "per_class.csv"
CALIBRATION = "calibration.json"  # next to the weights; calibration-tau-TAU.json for another tau than that of the run
