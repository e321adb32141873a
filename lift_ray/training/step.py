"""One step of training: the objective, the optimizer and the scaling of the loss."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lift_ray.errors import BadInput
from lift_ray.methods.lift import Lift
from lift_ray.registry import METHODS
from lift_ray.settings.run import RunConfig
from lift_ray.training.batches import Inputs, micro_batches
from lift_ray.training.label_prior import loss_of
from lift_ray.training.workspace import Workspace, autocast

if TYPE_CHECKING:
    from lift_ray.settings.run import OptimConfig

Forward = Callable[..., Tensor]
# what torch's optimizers keep of a parameter, and how its name is continued in a checkpoint
STATES = {"momentum_buffer": "", "exp_avg": "/mean", "exp_avg_sq": "/mean_square", "step": "/step"}


class TrainStep:
    """A step of the optimizer over the ranks' parts of a global batch; nothing is read back from the device.

    Args:
        config: resolved settings.
        workspace: the loaded backbone and data.
        model: the model to train.
        class_counts: (K,), training images of each class.

    Attributes:
        forward: the forward pass of images, compiled if the settings say so.

    Raises BadInput for settings that this machine does not support.
    """

    def __init__(self, config: RunConfig, workspace: Workspace, model: Lift, class_counts: NDArray[np.int64]) -> None:
        self.config, self.ranks, self.trained = config, workspace.ranks, model.trained()
        counts = torch.from_numpy(class_counts).float().to(self.ranks.device)
        labelled, method = loss_of(config, workspace, counts), config.method
        self.objective = METHODS.build(method.kind, method, counts, model, labelled, self.ranks)
        self.optimizer = make_optimizer(self.trained, config.optim)
        self.scaler = torch.amp.GradScaler(self.ranks.device.type, enabled=config.backbone.precision == "fp16")
        self.forward: Forward = self.objective.forward
        if config.backbone.compile:
            if self.ranks.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
                raise BadInput(
                    "backbone.compile",
                    "requires a C++ compiler on a CPU",
                    but="there is none",
                    remedy="install g++, or set it to false",
                )
            self.forward = torch.compile(self.forward)

    def __call__(self, forward: Forward, inputs: Inputs, labels: Tensor, lr: float) -> Tensor:
        """Update the model, and return the loss and the fraction classified correctly over the global batch, (2,)."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        means = torch.zeros(2, device=self.ranks.device)
        for part in micro_batches(len(labels), self.config.optim.accumulate):
            weight = (part.stop - part.start) / len(labels)  # so that micro-batches add up to the mean over the batch
            with autocast(self.config, self.ranks.device):
                output = forward(*(x if x is None else x[part] for x in inputs))
            loss, right = (value * weight for value in self.objective(output, labels[part]))
            self.scaler.scale(loss).backward()
            means += torch.stack([loss.detach(), right])
        means = self.ranks.average(self.trained.values(), means)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return means

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return what the optimizer keeps of each trained parameter, by the name of the parameter, for adamw `NAME/PART`."""
        states = {name: self.optimizer.state.get(parameter) or {} for name, parameter in self.trained.items()}
        return {name + STATES[part]: tensor for name, state in states.items() for part, tensor in state.items()}

    def load_optimizer_state(self, stored: Mapping[str, Tensor]) -> None:
        """Load the result of `optimizer_state`."""
        for name, parameter in self.trained.items():
            for part, suffix in STATES.items():
                if name + suffix in stored:
                    self.optimizer.state[parameter][part] = stored[name + suffix].to(parameter.device)


def make_optimizer(trained: Mapping[str, nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer of all trained parameters, with one fused update per step."""
    lr, decay = optim.lr, optim.weight_decay
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(trained.values(), lr, (optim.momentum, 0.999), weight_decay=decay, fused=True)
    nesterov = optim.optimizer == "sgd_nesterov"
    return torch.optim.SGD(trained.values(), lr, optim.momentum, weight_decay=decay, nesterov=nesterov, fused=True)
