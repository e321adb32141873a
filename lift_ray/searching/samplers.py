"""The samplers of Optuna that a search can use (registry.SAMPLERS), each from a seed."""

from __future__ import annotations

import importlib.util

import optuna
from optuna.samplers import BaseSampler

from lift_ray.errors import BadInput
from lift_ray.registry import SAMPLERS


def tpe(seed: int) -> BaseSampler:
    """Tree-structured Parzen estimators over all settings together."""
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True)


def random(seed: int) -> BaseSampler:
    """Random search."""
    return optuna.samplers.RandomSampler(seed=seed)


def grid(seed: int) -> BaseSampler:
    """Grid search: each point is given as a trial of its own, so nothing is drawn."""
    return optuna.samplers.RandomSampler(seed=seed)


def cmaes(seed: int) -> BaseSampler:
    """CMA-ES."""
    return optuna.samplers.CmaEsSampler(seed=seed)


def nsga2(seed: int) -> BaseSampler:
    """NSGA-II, for several objectives."""
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)


def gp(seed: int) -> BaseSampler:
    """Gaussian processes."""
    return optuna.samplers.GPSampler(seed=seed)


def check_sampler(sampler: str) -> None:
    """Raises BadInput when a package that the sampler needs is not installed."""
    package = SAMPLERS[sampler].package
    if package and importlib.util.find_spec(package) is None:
        raise BadInput(
            "search.sampler",
            f"{sampler} requires the package {package}",
            but="it is not installed",
            remedy=f"pip install {package}, or use tpe",
        )
