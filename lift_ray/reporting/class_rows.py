"""Table of all classes, which the page sorts."""

from __future__ import annotations

from typing import Any

import numpy as np

from lift_ray.reporting.confidence import FEW_IMAGES
from lift_ray.reporting.study_files import Predictions, StudyFiles

ClassTable = dict[str, Any]


def class_table(study: StudyFiles) -> ClassTable | None:
    """Return the classes with their accuracy on the predictions that chose the winner and on test; None without any of these.

    Returns:
        few_images: classes with fewer held-out images are uncertain.
        columns: (heading, kind) of each column; the kind is text, number or accuracy.
        rows: values of each class. An accuracy is [correct images, images], None for a class without images.
    """
    tested = study.winner[1] if study.winner else None
    measured = [(study.estimate, study.out_of_fold), ("test", tested)]
    known = [(name, predictions) for name, predictions in measured if predictions is not None]
    if not known or not study.class_names:
        return None
    groups, found = study.groups, [_counts(predictions, len(study.class_names)) for _, predictions in known]
    columns = [("class", "text"), ("group", "text"), ("training images", "number")]
    return {
        "few_images": FEW_IMAGES,
        "columns": [*columns, *((f"{name} (%)", "accuracy") for name, _ in known)],
        "rows": [
            [name, str(groups[k]), study.class_counts[k], *(counts[k] for counts in found)]
            for k, name in enumerate(study.class_names)
        ],
    }


def _counts(predictions: Predictions, num_classes: int) -> list[list[int] | None]:
    total = np.bincount(predictions.label, minlength=num_classes)
    correct = np.bincount(predictions.label[predictions.hits], minlength=num_classes)
    return [[int(c), int(n)] if n else None for c, n in zip(correct, total, strict=True)]
