"""Will what is saved of a method's transform be what was measured? transformers and peft load it, and know of none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightweight.preload import peft  # isort: skip  # before transformers, whose Trainer imports peft

import torch

from lightweight import models
from lightweight.importable import import_path
from lightweight.internals import torch as torch_internals
from lightweight.methods import MethodError
from lightweight.trial import Trial

LIBRARIES = {"accelerate", "bitsandbytes", "lightweight", "peft", "torch", "transformers", "transformers_modules"}
"""Packages whose modules and hooks are there again, or not needed, when a network is loaded."""


def check(trial: Trial, network: Any) -> str:
    """What the transform of a method has made of `network` without training it and no file keeps, in a line; nothing
    where there is none. Raises MethodError where it trains what would not be loaded from the result."""
    method = trial.method
    if method.transform is None:
        return ""
    whole: Any = None
    if method.adapter is not None and isinstance(network, peft.PeftModel):
        saved = peft.get_peft_model_state_dict(network, save_embedding_layers=False)
        places = {tensor.data_ptr() for tensor in saved.values()}
        lost = {name for name, weight in network.named_parameters() if weight.requires_grad} - {
            name for name, weight in network.named_parameters() if weight.data_ptr() in places
        }
    else:
        whole = models.skeleton(network.config, torch.float32, None)
        lost = network.state_dict().keys() ^ whole.state_dict().keys()
    if lost:
        raise MethodError(
            f"method {method.name}: what its transform {import_path(method.transform)} makes of the network is not "
            f"what transformers and peft would load again ({len(lost)} tensors, such as {min(lost)}): the suite "
            "measures it, train saves no result of it"
        )
    if (first := next(_unsaved(network, whole), None)) is None:
        return ""
    return (
        f"{trial.name}: its transform {import_path(method.transform)} adds what no file keeps ({first}): the saved "
        "network may compute something else than is measured here, unless the transform is applied to it again"
    )


def _unsaved(network: Any, whole: Any) -> Iterator[str]:
    """What of `network` computes something and is neither a library's nor in `whole`, what is loaded, if that is
    known."""
    known = None if whole is None else {name for name, _ in whole.named_modules()}
    for name, module in network.named_modules():
        where = f" of {name}" if name else ""
        if _is_an_authors(type(module)) or (known is not None and name not in known):
            yield f"the module {type(module).__name__}{f' at {name}' if name else ''}"
        if _is_an_authors(vars(module).get("forward")):
            yield f"another forward{where}"
        for hook in torch_internals.forward_hooks(module):
            if _is_an_authors(hook):
                yield f"the hook {getattr(hook, '__qualname__', type(hook).__name__)}{where}"


def _is_an_authors(part: Any) -> bool:
    """Whether a class, a function or what is called like one is of no library."""
    if part is None:
        return False
    while (inner := getattr(part, "func", None)) is not None:  # functools.partial
        part = inner
    of = part if hasattr(part, "__qualname__") else type(part)
    return str(of.__module__).partition(".")[0] not in LIBRARIES
