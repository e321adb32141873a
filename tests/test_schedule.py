"""The learning rate, the optimizer and the sampling of classes, against torch's own and against each other."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from lift_ray.settings.run import OptimConfig
from lift_ray.training.run import learning_rate
from lift_ray.training.step import make_optimizer


@pytest.mark.parametrize("epochs", [1, 5, 10])
def test_cosine_by_epoch_is_the_scheduler_of_the_reference(epochs: int) -> None:
    settings = OptimConfig(schedule="cosine_by_epoch", epochs=epochs)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], settings.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        rates = [learning_rate(settings, epoch, part) for part in (0.0, 0.3, 0.99)]
        assert rates == pytest.approx(scheduler.get_last_lr() * 3)
        optimizer.step()
        scheduler.step()


def test_cosine_falls_in_every_step_and_meets_the_other_at_the_start_of_an_epoch() -> None:
    by_step, by_epoch = OptimConfig(epochs=3, schedule="cosine"), OptimConfig(epochs=3)
    rates = [learning_rate(by_step, step // 10, step % 10 / 10) for step in range(30)]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 30
    assert [learning_rate(by_epoch, epoch, 0.5) for epoch in range(3)] == rates[::10]


def test_nesterov_is_torchs_and_needs_momentum() -> None:
    weight = {"w": torch.nn.Parameter(torch.zeros(1))}
    assert make_optimizer(weight, OptimConfig(optimizer="sgd_nesterov")).param_groups[0]["nesterov"]
    assert not make_optimizer(weight, OptimConfig()).param_groups[0]["nesterov"]
    with pytest.raises(ValidationError, match="sgd_nesterov needs momentum above 0"):
        OptimConfig(optimizer="sgd_nesterov", momentum=0.0)
