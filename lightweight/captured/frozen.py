"""What a frozen layer keeps for its backward pass: at 2048 tokens that, not the weights, is what fills a card.

peft's LoRA layer keeps its dropped-out input and a mask besides what the layer before it keeps anyway, and passes over
its output three times. Here the layers that project one input, as query, key and value do, are one function with their
adapters. It keeps their input once, or, where that is the output of a norm or an activation, nothing: those are
computed again from what they themselves keep. Dropout's masks are drawn again from a seed where Triton can do it in the
same pass over memory. Frozen layers alone are changed, while the captured step trains; everything is exact up to
rounding.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

from lightweight.preload import peft  # isort: skip  # before transformers, which may import it

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch.nn.functional import gelu, rms_norm, silu
from transformers.activations import NewGELUActivation, SiLUActivation

from lightweight.captured import recomputed
from lightweight.captured.projections import Family
from lightweight.internals import torch as torch_internals

SIBLINGS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""Names under which a module's children project one and the same input."""


class Lean:
    """The frozen layers of a peft model with this module's forward passes, until `undo`.

    `roll` must be called before every forward pass: dropout's numbers of that pass and its backward pass follow from
    one draw of torch's generator.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.changed: list[Any] = []
        device = next(model.parameters()).device
        self._seed = torch.zeros((), dtype=torch.int64, device=device)
        adapted: list[Any] = [module for module in model.modules() if _is_plain_lora(module)]
        widths = {module.in_features for module in adapted}
        # Rotary embeddings make new queries and keys; in one tensor with the values the old ones would be kept as well.
        joins = getattr(getattr(model, "config", None), "rope_parameters", None) is None
        site = 0
        for modules in _families(model, adapted):
            family = Family(modules, self._seed, site, joins=joins)
            for index, module in enumerate(modules):
                self._change(module, functools.partial(family.project, index))
            site += len(modules)
        for module in model.modules() if adapted else ():
            if recomputed.is_gated(module):
                self._change(module, functools.partial(recomputed.gated, module))
            elif recomputed.is_post_norm_opt(module):
                self._change(module, functools.partial(recomputed.post_norm_opt, module, self._seed, site))
                site += 2
            elif (forward := _forward_of(module, widths)) and not any(p.requires_grad for p in module.parameters()):
                self._change(module, forward)

    def roll(self) -> None:
        """Draw the seed of the next forward pass's dropout, on the device."""
        self._seed.random_(2**31)

    def undo(self) -> None:
        """Give every layer its own forward pass back."""
        for module in self.changed:
            del module.forward
        self.changed.clear()

    def _change(self, module: Any, forward: Callable[..., torch.Tensor]) -> None:
        module.forward = forward
        self.changed.append(module)


def _forward_of(module: Any, widths: set[int]) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A forward pass of a norm or an activation whose output can be computed again; None for any other module.

    `widths`: what the adapted layers take; an activation no adapter looks at need not be kept itself.
    """
    function: Callable[[torch.Tensor], torch.Tensor]
    if type(module) is torch.nn.LayerNorm and len(module.normalized_shape) == 1 and module.weight is not None:
        function = functools.partial(recomputed.norm, module.weight, module.bias, module.eps, True)
    elif type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        function = functools.partial(recomputed.norm, module.weight, None, module.variance_epsilon, False)
        if not _is_plain(module):
            return None
    elif type(module) is NewGELUActivation:
        function = functools.partial(gelu, approximate="tanh")  # the same formula, in one pass instead of eight
    elif type(module) in (SiLUActivation, torch.nn.SiLU):
        function = silu
    elif type(module) is torch.nn.ReLU:
        return functools.partial(recomputed.relu, widths)
    else:
        return None
    return functools.partial(recomputed.recomputable, function)


def _is_plain(module: Any) -> bool:
    """Whether an RMS norm of transformers is torch's with its weight, to which some add one. Asked of a twin with
    numbers of its own, since a forecast's weights have none."""
    with torch_internals.with_numbers(), torch.no_grad():
        twin = copy.copy(module)
        vars(twin).pop("forward", None)
        weight = torch.linspace(0.5, 2.0, module.weight.numel())
        sample = torch.linspace(-3, 3, 4 * weight.numel()).view(4, -1)
        found: torch.Tensor = torch.func.functional_call(twin, {"weight": weight}, (sample,))
        return torch.allclose(found, rms_norm(sample, weight.shape, weight, module.variance_epsilon), atol=1e-3)


def _is_plain_lora(module: Any) -> bool:
    """One LoRA adapter without variants, in its layer's own number format, on a frozen layer."""
    if not isinstance(module, peft.tuners.lora.LoraLayer) or not isinstance(module, torch.nn.Module):
        return False
    base: Any = module.get_base_layer()
    if not (type(base) is torch.nn.Linear or isinstance(base, Linear4bit)):
        return False
    names = list(module.lora_A.keys())
    if len(names) != 1 or module.active_adapters != names or module.merged or module.disable_adapters:
        return False
    (name,) = names
    computed_in = base.weight.dtype if type(base) is torch.nn.Linear else base.compute_dtype
    return (
        not module.lora_variant
        and type(module.lora_B[name]) is torch.nn.Linear  # AdaLoRA's and others' are weights by themselves
        and module.lora_B[name].bias is None
        and not any(parameter.requires_grad for parameter in base.parameters())
        and module.lora_A[name].weight.dtype == computed_in
    )


def _families(model: torch.nn.Module, adapted: list[Any]) -> Iterator[list[Any]]:
    """The adapted layers, each together with the frozen ones that project the same input."""
    left = dict.fromkeys(adapted)
    for parent in model.modules():
        for names in SIBLINGS:
            family = [child for name, child in parent.named_children() if name in names]
            if not any(child in left for child in family) or not all(
                child in left or _is_frozen_linear(child) for child in family
            ):
                continue
            yield family
            for child in family:
                left.pop(child, None)
    yield from ([module] for module in left)


def _is_frozen_linear(module: Any) -> bool:
    return (type(module) is torch.nn.Linear or isinstance(module, Linear4bit)) and not any(
        parameter.requires_grad for parameter in module.parameters()
    )
