"""A study with thousands of classes, for simulation.py: memory of head, logits and counts, the text start, and the report page."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from simulated_data import Stages, long_tail

Figures = dict[str, Any]
BATCH, EACH = 128, 3  # images of a step; validation and test images of a class, as iNaturalist 2018 has them
ROUNDS = 20
LONGEST_S = 300  # that a browser may take
CLICKS = """<body style="margin:0"><iframe src="{page}" width="1400" height="900"></iframe><script>
onload = () => {{
  const inside = document.querySelector("iframe"), page = inside.contentDocument, found = {{}};
  const loading = inside.contentWindow.performance.getEntriesByType("navigation")[0];
  found.load_ms = loading.loadEventEnd || loading.loadEventStart || loading.domContentLoadedEventEnd;
  const timed = (name, act) => {{
    const began = performance.now();
    act();
    page.documentElement.getBoundingClientRect();
    found[name] = performance.now() - began;
  }};
  const all = page.querySelector(".all");
  if (all) timed("show_all_ms", () => all.click());
  if (all) timed("sort_ms", () => page.querySelector(".sortable th button").click());
  found.rows = page.querySelectorAll(".sortable tbody tr").length;
  found.elements = page.querySelectorAll("*").length;
  document.title = JSON.stringify(found);
}};
</script>"""


def made_up(images: int, classes: int) -> Any:
    """Return an open dataset without files: a long tail for training, and as many images of each class for the other splits."""
    from lift_ray.data.dataset import Dataset, Split

    labels = {"train": np.sort(long_tail(images, classes))}
    labels |= dict.fromkeys(("validation", "test"), np.repeat(np.arange(classes), EACH))
    splits = {name: Split(name, (), these, np.arange(len(these))) for name, these in labels.items()}
    names = tuple(f"genus{label // 40} species{label}" for label in range(classes))
    return Dataset("made-up", names, splits, labelled_counts=splits["train"].class_counts(classes))


def model(images: int, classes: int) -> Figures:
    """Memory of a worker by part as `--dry-run` estimates it, bytes of what an evaluation counts, and seconds of the text start."""
    import torch

    from lift_ray.evaluation.accumulator import MetricAccumulator, PredictionCollector, TauGrid
    from lift_ray.methods.world import Ranks
    from lift_ray.settings.run import RunConfig
    from lift_ray.settings.search import TAUS
    from lift_ray.training.plan import memory
    from lift_ray.training.workspace import Workspace

    data, config = made_up(images, classes), RunConfig.model_validate({"tuner": {"kind": "linear_probe"}})
    workspace = Workspace(data, Ranks.alone(num_cpus=1))
    backbone = workspace.backbone(config)
    stages = Stages()
    weights = backbone.semantic_weights(data.class_names, config.head.template)
    stages.done("text start")
    backbone.semantic_weights(data.class_names, config.head.template)
    stages.done("text start again")
    lift = workspace.build(workspace.resolve(config), trained_already=True)
    cpu, counts = torch.device("cpu"), data.split("train").class_counts(classes)
    every = [MetricAccumulator(classes, cpu), TauGrid(TAUS, counts, cpu), PredictionCollector(EACH * classes, 0, cpu)]
    logits, labels = torch.randn(BATCH, classes), torch.randint(classes, (BATCH,))
    halves, laps = labels % 2, []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        every[0].add(logits, labels)
        every[1].add(logits, labels, halves)
        laps.append(time.perf_counter() - began)
    began = time.perf_counter()
    every[0].result(np.resize(np.array(["many", "medium", "few"]), classes))
    every[1].result()
    return stages.found | {
        "classes": classes,
        "width": weights.shape[1],
        "head_bytes": weights.nbytes,
        "logits_bytes": logits.nbytes,
        "counts_bytes": sum(tensor.nbytes for one in every for tensor in one.tensors()),
        "count_ms_per_batch": round(1000 * statistics.median(laps), 2),
        "result_ms": round(1000 * (time.perf_counter() - began), 1),
        "worker_bytes": memory(lift, config, BATCH),
        "out_of_fold_bytes": 4 * classes * images,
    }


def report(images: int, classes: int, trials: int) -> Figures:
    """Write the report of a played study: seconds, memory, sizes, and what a browser says of the page."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from made_study import make_trials, write_study

    from lift_ray.evaluation.metrics import PUBLISHED, ClassGroups, per_class_rows, write_per_class
    from lift_ray.reporting.report import write_report
    from lift_ray.storage.layout import BEST, OUT_OF_FOLD_FILE, PAGE, PER_CLASS, REPORT, TRIALS, TRIALS_CSV

    data = made_up(images, classes)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_study(Path(temporary) / "out", make_trials(trials), data=data)
        label = data.split("validation").labels
        predicted = np.where(np.random.default_rng(3).random(len(label)) < 0.6, label, (label + 7) % classes)
        columns = {"label": label, "predicted": predicted, "confidence": np.full(len(label), 0.5)}
        pq.write_table(pa.table(columns), folder / BEST / OUT_OF_FOLD_FILE)
        counts = data.split("train").class_counts(classes)
        found = [np.bincount(x, minlength=classes) for x in (label[label == predicted], label, predicted)]
        rows = per_class_rows(data.class_names, counts, ClassGroups.of(counts, PUBLISHED).names, *found)
        write_per_class(rows, folder / BEST / PER_CLASS)
        stages = Stages()
        write_report([str(folder)])
        stages.done("report")
        sizes = {path.name: path.stat().st_size for path in (folder / REPORT).iterdir()}
        seen = in_browser(folder / REPORT / PAGE)
        tables = (folder / BEST / PER_CLASS, folder / TRIALS_CSV, folder / TRIALS)
        return stages.found | {
            "classes": classes,
            "trials": trials,
            "page_bytes": sizes.pop(PAGE),
            "largest_csv": max(sizes.items(), key=lambda pair: pair[1]),
            "csv_bytes": sum(sizes.values()),
            "tables_bytes": {path.name: path.stat().st_size for path in tables if path.exists()},
            "browser": seen,
        }


def in_browser(page: Path) -> Figures:
    """Return milliseconds of loading a page in Chromium, of showing and of sorting all classes, medians of three; and its plots."""
    from browser import CHROME, seen_in_browser

    if CHROME is None:
        return {"browser": "none"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        frame = folder / "clicks.html"
        frame.write_text(CLICKS.format(page=page.as_uri()))
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
        words = [CHROME, *options, f"--user-data-dir={folder / 'clicks'}", frame.as_uri()]
        laps = []
        for _ in range(3):
            try:
                done = subprocess.run(words, capture_output=True, text=True, timeout=LONGEST_S, check=True)
            except subprocess.TimeoutExpired:
                return {"browser": f"no answer within {LONGEST_S} s"}
            title = re.search("<title>(.*?)</title>", done.stdout)
            assert title, done.stderr[-2000:]
            laps.append(json.loads(title[1]))
        seen = seen_in_browser(page, 1400, folder)
    assert seen["plots"] == seen["drawn"], seen
    return {name: round(statistics.median(lap[name] for lap in laps), 1) for name in laps[0]} | {"plots": seen["plots"]}
