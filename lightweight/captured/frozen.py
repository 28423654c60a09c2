"""What a frozen layer keeps for its backward pass: at 2048 tokens that, not the weights, is what fills a card.

peft's LoRA layer keeps its dropped-out input and a mask besides what the layer before it keeps anyway, and passes over
its output three times. Here the layers that project one input, as query, key and value do, are one function with their
adapters. It keeps their input once, or, where that is the output of a norm or an activation, nothing: those are
computed again from what they themselves keep. Dropout's masks are drawn again from a seed where Triton can do it in the
same pass over memory. Frozen layers alone are changed, while the captured step trains; everything is exact up to
rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from lightweight.preload import peft  # isort: skip  # before transformers, which may import it

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch.nn.functional import rms_norm

from lightweight.captured import activations, blocks, joined, launching, recomputed, rotary
from lightweight.captured.joined import Placing
from lightweight.captured.kernels import Norm
from lightweight.captured.projections import Family, layers_of
from lightweight.internals import torch as torch_internals
from lightweight.internals import transformers as transformers_internals

SIBLINGS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""Names under which a module's children project one and the same input."""

HEAD_NORMS = ("q_norm", "k_norm")
"""Names of the norms that an attention takes of each head of its queries and keys."""

ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
"""Where modules that may be activations are written."""


class Lean:
    """The frozen layers of a peft model with this module's forward passes, until `undo`.

    `roll` must be called before every forward pass: dropout's numbers of that pass and its backward pass follow from
    one draw of torch's generator.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.changed: list[Any] = []
        device = next(model.parameters()).device
        self._seed = torch.zeros((), dtype=torch.int64, device=device)
        self._placing = Placing()
        adapted: list[Any] = [module for module in model.modules() if _is_plain_lora(module)]
        if not adapted:
            self._undo_rotations: Callable[[], None] = lambda: None
            return
        rotations, self._undo_rotations = rotary.install(model)
        norms = {module: norm for module in model.modules() if (norm := _norm_of(module)) is not None}
        families = self._project(model, adapted, rotations)
        self._norm(model, norms, rotations, families)
        self._activate(model, families)
        self._placing.place()

    def _project(
        self, model: torch.nn.Module, adapted: list[Any], rotations: dict[Any, rotary.Rotation]
    ) -> dict[Any, Family]:
        """Have layers with adapters project what they share at once. The family of each."""
        # Where rotary embeddings make new queries and keys, and not in place, the old ones would be kept as well in one
        # tensor with the values.
        turns = getattr(getattr(model, "config", None), "rope_parameters", None) is not None
        most = max(module.in_features * module.out_features for module in adapted)
        families: dict[Any, Family] = {}
        site = 0
        found = list(_families(model, adapted))
        joining = {}
        for parent, modules in found:
            in_place = parent in rotations and launching.take(self._seed)
            joining[modules[0]] = not turns or in_place or hasattr(parent, "gate_proj")
        if launching.take(self._seed):
            _gather(model, [modules for _, modules in found], joining)
        for parent, modules in found:
            joins = joining[modules[0]]
            between = _between(parent, modules)
            family = Family(modules, self._seed, site, joins=joins, most=most, between=between)
            if family.whole is not None:
                self._placing.add(family.whole)
            for index, module in enumerate(modules):
                self._change(module, functools.partial(family.project, index))
            site += len(modules)
            families |= dict.fromkeys(modules, family)
        return families

    def _norm(
        self,
        model: torch.nn.Module,
        norms: dict[Any, Norm],
        rotations: dict[Any, rotary.Rotation],
        families: dict[Any, Family],
    ) -> None:
        """Have norms computed again in the backward pass, with the sums they are of, and the turns that follow them."""
        layers = list(blocks.blocks_of(model, norms))
        rooms: dict[Any, int] = {}
        for block in layers:
            for taker, name in zip((block.layer.self_attn, block.layer.mlp), block.form.before, strict=True):
                norm = getattr(block.layer, name)
                theirs = [families[child] for child in taker.children() if child in families]
                width = norms[norm].weight.numel()
                rooms[norm] = max((each.room for each in theirs if each.takes(width)), default=0)
        for module, norm in norms.items():
            self._change(module, functools.partial(blocks.normed, module, norm, rooms.get(module, 0)))
        for block in layers:
            block.rooms.update(rooms)
            self._change(block.layer, block.forward)
        for attention, rotation in rotations.items():
            heads: list[Any] = [getattr(attention, name, None) for name in HEAD_NORMS]
            of_head = getattr(attention, "head_dim", None)
            if not all(module in norms and norms[module].weight.numel() == of_head for module in heads):
                continue
            own = {module: module.forward for module in heads}
            for module in heads:
                module.forward = functools.partial(rotation.defer, rotary.HeadNorm.of(norms[module]))
            self._change(attention, functools.partial(rotation.forward, attention, own))

    def _activate(self, model: torch.nn.Module, families: dict[Any, Family]) -> None:
        """Have gates and activations computed again in the backward pass, and OPT's last norms with their sums."""
        widths = {module.in_features for module in families}
        site = len(families)  # for dropout, after those of the families
        for module in model.modules():
            if (activation := activations.gating_of(module)) is not None:
                self._change(
                    module, functools.partial(activations.gated, module, activation, families.get(module.down_proj))
                )
            elif recomputed.is_post_norm_opt(module):
                self._change(module, functools.partial(recomputed.post_norm_opt, module, self._seed, site))
                site += 2
            elif (forward := _activation_of(module, widths)) is not None:
                self._change(module, forward)

    def roll(self) -> None:
        """Draw the seed of the next forward pass's dropout, on the device, and place the adapters as they are now."""
        self._seed.random_(2**31)
        self._placing.place()

    def undo(self) -> None:
        """Give every layer its own forward pass back."""
        for module in self.changed:
            del module.forward
        self.changed.clear()
        self._undo_rotations()
        self._undo_rotations = lambda: None

    def _change(self, module: Any, forward: Callable[..., torch.Tensor]) -> None:
        module.forward = transformers_internals.standing_in(module, forward)
        self.changed.append(module)


def _norm_of(module: Any) -> Norm | None:
    """The frozen norm that `module` takes; None for any other module."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or any(p.requires_grad for p in module.parameters()):
        return None
    if type(module) is torch.nn.LayerNorm:
        return Norm(weight, module.bias, module.eps, True)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float) or len([*module.parameters()]) > 1:
        return None
    for offset in (0.0, 1.0):
        norm = Norm(weight, None, eps, False, offset)
        if _takes(module, norm):
            return norm
    return None


def _takes(module: Any, norm: Norm) -> bool:
    """Whether an RMS norm of transformers is torch's with its weight, to which some add one. Asked of a twin with
    numbers of its own, since a forecast's weights have none."""
    with torch_internals.with_numbers(), torch.no_grad():
        twin = torch_internals.twin_of(module, {})
        weight = torch.linspace(0.5, 2.0, norm.weight.numel())
        sample = torch.linspace(-3, 3, 4 * weight.numel()).view(4, -1) * torch.tensor([[1.0], [1.0], [1.0], [1e-3]])
        try:
            found = torch.func.functional_call(twin, {"weight": weight}, (sample,))
        except Exception:  # noqa: BLE001  of any model's code: it is something else
            return False
        expected = rms_norm(sample, weight.shape, weight + norm.offset, norm.eps)
        return isinstance(found, torch.Tensor) and torch.allclose(found, expected, atol=1e-3)


def _activation_of(module: Any, widths: set[int]) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A forward pass of an activation whose output can be computed again; None for any other module.

    `widths`: what the adapted layers take; an activation no adapter looks at need not be kept itself.
    """
    if type(module) is torch.nn.ReLU:
        return functools.partial(recomputed.relu, widths)
    if type(module).__module__ not in ACTIVATIONS:
        return None
    activation = activations.activation_of(module)
    if activation is None:
        return None
    if activation == "relu2":
        return functools.partial(activations.activated, activation)
    return functools.partial(recomputed.recomputable, activations.FUNCTIONS[activation])


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


def _families(model: torch.nn.Module, adapted: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """The adapted layers, each together with the frozen ones that project the same input, and whose they are, where
    there are several."""
    left = dict.fromkeys(adapted)
    for parent in model.modules():
        for names in SIBLINGS:
            family = [child for name, child in parent.named_children() if name in names]
            if not any(child in left for child in family) or not all(
                child in left or _is_frozen_linear(child) for child in family
            ):
                continue
            yield parent, family
            for child in family:
                left.pop(child, None)
    yield from ((None, [module]) for module in left)


def _between(parent: Any, family: list[Any]) -> list[torch.Tensor]:
    """The frozen weights that a checkpoint, whose tensors are sorted by name, has among those of `family`: OPT's and
    Llama's attention has that of its output between those of its keys and its queries."""
    if parent is None:
        return []
    children = dict(sorted(parent.named_children()))
    places = [index for index, child in enumerate(children.values()) if child in family]
    others = [child for child in [*children.values()][places[0] : places[-1]] if child not in family]
    bases = [child.get_base_layer() if isinstance(child, peft.tuners.lora.LoraLayer) else child for child in others]
    return [base.weight for base in bases if type(base) is torch.nn.Linear and not base.weight.requires_grad]


def _gather(model: torch.nn.Module, families: list[list[Any]], joining: dict[Any, bool]) -> None:
    """Have the weights of each of a model's layers, those that become one with their adapters, lie in one piece."""
    owners: dict[Any, Any] = {}
    for modules in model.modules():
        for layer in modules.children() if isinstance(modules, torch.nn.ModuleList) else ():
            for module in layer.modules():
                owners.setdefault(module, layer)
    by_owner: dict[Any, list[joined.Layers]] = {}
    for family in families:
        layers = layers_of(family, joins=joining[family[0]])
        if layers is not None and family[0] in owners:
            by_owner.setdefault(owners[family[0]], []).append(layers)
    for owner, of_it in by_owner.items():
        bases = {base for bases, _ in of_it for base in bases}
        own = {base.weight for base in bases if isinstance(base.weight, torch.nn.Parameter)}
        others = [weight for weight in owner.parameters() if not weight.requires_grad and weight not in own]
        joined.gather(of_it, others)


def _is_frozen_linear(module: Any) -> bool:
    return (type(module) is torch.nn.Linear or isinstance(module, Linear4bit)) and not any(
        parameter.requires_grad for parameter in module.parameters()
    )
