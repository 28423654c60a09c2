"""Does an optimizer that a method brings along train what the method says, at the rate that it says?

TrainingArguments have a learning rate, and `--learning-rate` and a search set it. An optimizer with a rate of its own
would be recorded with one and train at another, and one that leaves weights out would train fewer than are counted.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from transformers import Trainer

from lightweight import importable
from lightweight.methods import Method, MethodError
from lightweight.models import reason
from lightweight.training_arguments import OF_OPTIMIZER

ClassAndKeywords = tuple[type[torch.optim.Optimizer], dict[str, Any]]


def make(method: Method, network: torch.nn.Module, arguments: Any) -> torch.optim.Optimizer | ClassAndKeywords:
    """The optimizer that `method` brings along for `network`; or, where it names a class, that class and its keywords,
    for the Trainer to give its groups of weights to. Raises MethodError."""
    optimizer = method.optimizer
    if isinstance(optimizer, tuple):
        kind, keywords = optimizer
        return kind, {"lr": arguments.learning_rate, **keywords}
    assert optimizer is not None
    made = optimizer(network, arguments)
    if not isinstance(made, torch.optim.Optimizer):
        raise MethodError(
            f"method {method.name}: its optimizer {importable.import_path(optimizer)} returns a "
            f"{type(made).__name__}: return a torch.optim.Optimizer"
        )
    return made


def check(trainer: Trainer, method: Method) -> torch.optim.Optimizer:
    """The optimizer of `trainer`, made to see what it does; the Trainer makes its own. Raises MethodError where it
    leaves trained weights out, or does not take what `method` says of it in its TrainingArguments."""
    network, arguments = trainer.model, trainer.args
    assert network is not None
    try:
        made = _made(trainer)
    except (TypeError, ValueError) as error:
        if isinstance(error, MethodError):
            raise
        raise MethodError(f"method {method.name}: {_whose(method)} cannot be made ({reason(error)})") from error
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise MethodError(
            f"method {method.name}: {_whose(method)} computes the loss again by itself (its step needs a closure), "
            "which the Trainer cannot give it: take one that steps by the gradients"
        )
    held = {id(weight) for group in made.param_groups for weight in group["params"]}
    missing = [name for name, weight in network.named_parameters() if weight.requires_grad and id(weight) not in held]
    if missing:
        raise MethodError(
            f"method {method.name}: {_whose(method)} leaves out {len(missing)} trained weights, such as {missing[0]}: "
            "give it all, or have a transform freeze them (requires_grad_(False))"
        )
    for name in sorted(set(OF_OPTIMIZER) & set(method.training_arguments)):
        said = getattr(arguments, name)
        other = copy.copy(arguments)
        setattr(other, name, said / 2 if said else 0.5)
        trainer.args = other
        try:
            if _settings(_made(trainer)) == _settings(made):
                raise MethodError(
                    f"method {method.name}: {name}={said:g} is not used by {_whose(method)}: let it read "
                    f"{name} of the TrainingArguments, or leave that out"
                )
        finally:
            trainer.args = arguments
    return made


def _made(trainer: Trainer) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = trainer.create_optimizer()
    trainer.optimizer = None
    return made


def _settings(optimizer: torch.optim.Optimizer) -> str:
    """What an optimizer does with each group of its weights."""
    return repr([{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups])


def _whose(method: Method) -> str:
    if method.optimizer is None:
        assert method.trainer is not None
        return f"the optimizer of its trainer {importable.import_path(method.trainer)}"
    of = method.optimizer[0] if isinstance(method.optimizer, tuple) else method.optimizer
    return f"its optimizer {importable.import_path(of)}"
