"""Importance of each setting for the objective, by Optuna's PED-ANOVA (arXiv 2304.10255)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial

from lift_ray.reporting.study_files import StudyFiles, Trial

FEWEST_TRIALS = 10


def importances(study: StudyFiles) -> dict[str, float]:
    """Return importances that sum to 1 of the settings that every trial has; empty if there are too few finished trials."""
    return _importances_among(study, study.finished)


def importances_within(study: StudyFiles) -> dict[str, float]:
    """Return the importance of each conditional setting, such as a bottleneck, among the trials that have it.

    A setting that too few trials have is left out.
    """
    out: dict[str, float] = {}
    for name, param in study.space.items():
        if param.get("when"):
            found = _importances_among(study, [t for t in study.finished if t.get(name) is not None])
            out |= {name: found[name]} if name in found else {}
    return out


def _importances_among(study: StudyFiles, trials: list[Trial]) -> dict[str, float]:
    """Return the importances of the settings that all these trials have."""
    metric, mode = study.objective
    shared = [name for name, param in study.space.items() if param and all(t.get(name) is not None for t in trials)]
    ranges = {name: distribution(study.space[name]) for name in shared}
    varied = {n: d for n, d in ranges.items() if not d.single() and len({t[n] for t in trials}) > 1}
    if len(trials) < FEWEST_TRIALS or len(varied) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        memory = optuna.create_study(direction="maximize" if mode == "max" else "minimize")
        for trial in trials:
            values = {name: trial[name] for name in varied}
            if all(d._contains(d.to_internal_repr(values[n])) for n, d in varied.items()):
                memory.add_trial(create_trial(params=values, distributions=varied, value=trial[metric]))
        if len(memory.trials) < FEWEST_TRIALS:
            return {}
        found = get_param_importances(memory, evaluator=PedAnovaImportanceEvaluator())
    return {name: float(value) for name, value in found.items()}


def distribution(param: Mapping[str, Any]) -> BaseDistribution:
    """Return the Optuna distribution of a searched setting, given as in the search-space file."""
    if param.get("choices") is not None:
        return CategoricalDistribution(param["choices"])
    low, high = param.get("int") or param["float"]
    if param.get("int"):
        return IntDistribution(int(low), int(high), log=param["log"], step=round(param["step"] or 1))
    return FloatDistribution(low, high, log=param["log"], step=param["step"])
