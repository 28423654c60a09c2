"""Which layers of a network is a method's adapter put on, and how?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from lightweight import importable, names
from lightweight.internals import peft as peft_internals
from lightweight.methods.method import Method, MethodError
from lightweight.models import Model, configuration, ran_out, reason, skeleton
from lightweight.preload import peft

from peft.tuners.tuners_utils import BaseTunerLayer  # isort: skip  # after preload, which decides how peft is imported

QUERIES_AND_VALUES = {"q_proj", "v_proj"}
"""What LoRA was first put on (https://arxiv.org/abs/2106.09685, section 4.2), as most architectures call it."""


def adapt(method: Method, network: Any, upcast: bool = True) -> Any:
    """`network`, loaded or on the meta device, with the adapter of `method` and then its `transform`, as peft's
    documentation does it. `upcast` holds the unquantized parts of a quantized model in fp32. Raises MethodError if the
    adapter does not fit the architecture, or if the transform does not return a network."""
    if getattr(network, "is_quantized", False) and upcast:
        network = peft.prepare_model_for_kbit_training(
            network,
            use_gradient_checkpointing=method.training_arguments.get("gradient_checkpointing", False),
            gradient_checkpointing_kwargs=method.training_arguments.get("gradient_checkpointing_kwargs"),
        )
    if method.adapter is not None:
        network = _with_adapter(method, network)
    if method.transform is None:
        return network
    transformed = method.transform(network)
    its = f"method {method.name}: its transform {importable.import_path(method.transform)}"
    if not (hasattr(transformed, "named_parameters") and hasattr(transformed, "config")):
        without = ", which has no config" if hasattr(transformed, "named_parameters") else ""
        raise MethodError(f"{its} returns a {type(transformed).__name__}{without}: return the network")
    if not any(weight.requires_grad for weight in transformed.parameters()):
        raise MethodError(f"{its} leaves nothing to train: leave some weights as requires_grad_(True)")
    return transformed


def _with_adapter(method: Method, network: Any) -> Any:
    adapter = adapter_for(method, network)
    try:
        return peft.get_peft_model(network, adapter)
    except Exception as error:
        if ran_out(error):
            raise
        named = getattr(adapter, "target_modules", None)
        mend = "name layers that it has in target_modules" if named else "take another adapter"
        if "lora_dropout" in str(error):  # of peft, for experts whose weights are one parameter
            mend = "give lora_dropout=0, or name its attention's layers in target_modules"
        raise MethodError(
            f"method {method.name}: its {adapter.peft_type.value} cannot be put on {network.config.model_type} "
            f"({reason(error)}): {mend}"
        ) from error


def adapter_for(method: Method, network: Any) -> Any:
    """A copy of the adapter for peft to write into. Where it leaves its layers to the architecture
    (`target_modules` None), they are those of peft's own mapping; where that knows none, the projections of queries
    and values, which most of the mapping names; where the network has none of that name, all linear layers. What an
    adapter computes from weights to begin with (PiSSA, OLoRA) it cannot from those of the meta device, and has the
    shapes of any other beginning there."""
    adapter: Any = copy.deepcopy(method.adapter)
    if isinstance(getattr(adapter, "init_lora_weights", None), str) and any(w.is_meta for w in network.parameters()):
        adapter.init_lora_weights = True
    mapping = _target_mapping(adapter)
    if mapping is None or adapter.target_modules is not None or getattr(adapter, "target_parameters", None):
        return adapter
    architecture = network.config.model_type
    names = {name.rpartition(".")[2] for name, _ in network.named_modules()}
    layers = mapping.get(architecture, QUERIES_AND_VALUES if names >= QUERIES_AND_VALUES else "all-linear")
    adapter.target_modules = layers if isinstance(layers, str) else set(layers)
    if layers == "all-linear" and "mamba" in architecture:
        adapter.exclude_modules = {"conv1d", "out_proj"}  # which peft refuses there
    return adapter


def named_layers(method: Method, network: Any) -> list[str]:
    """The names of the layers that get an adapter, without their path, for a library that takes nothing else. Raises
    MethodError if there are none, or if the names also match layers without an adapter."""
    places = [name for name, _ in network.named_modules()]
    adapter = adapter_for(method, network)
    chosen = peft_internals.chosen_layers(adapter, network)
    names = sorted({place.rpartition(".")[2] for place in chosen})
    also = sorted(place for place in places if place.rpartition(".")[2] in names and place not in chosen)
    if also or not names:
        problem = f"{also[0]} has the name of one that it is put on" if also else "there is none of them"
        raise MethodError(
            f"method {method.name}: {method.library} takes layers by name alone, and of target_modules "
            f"{adapter.target_modules!r} {problem}: name layers of which all are meant"
        )
    return names


def check_layers(method: Method, model: Model) -> None:
    """Raise MethodError, in one line, if `model` lacks a layer that the command line names for the adapter of `method`.
    peft ignores names that it does not find, as long as one is found; so a method's own names, which may be for several
    architectures, are not checked. Raises ModelError if there is no network."""
    wanted = method.changed.get("lora_layers", "all-linear")
    if isinstance(wanted, str):
        return
    network = skeleton(configuration(model), torch.float32, None)
    places = [place for place, _ in network.named_modules()]
    # as peft finds them: by the end of their place
    missing = sorted(name for name in wanted if not any(f".{place}".endswith(f".{name}") for place in places))
    if not missing:
        return
    known = sorted({place.rpartition(".")[2] for place, layer in network.named_modules() if _is_linear(layer)})
    raise MethodError(
        f"{model.name} x {method.name}: --lora-layers: there is no layer called {' or '.join(missing)}: "
        f"name some of {', '.join(known)}{names.question(missing[0], known)}"
    )


def _is_linear(layer: Any) -> bool:
    return isinstance(layer, torch.nn.Linear | Conv1D)


def _target_mapping(adapter: Any) -> Mapping[str, Any] | None:
    """peft's layers by architecture for an adapter of this kind, None for a kind that is put on no layers."""
    tuner = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(adapter.peft_type)
    return getattr(tuner, "target_module_mapping", None) if hasattr(adapter, "target_modules") else None


def adapted_layers(network: Any) -> tuple[str, ...]:
    """The names, without their path, of the layers that have an adapter, sorted."""
    layers = (name for name, module in network.named_modules() if isinstance(module, BaseTunerLayer))
    return tuple(sorted({name.rpartition(".")[2] for name in layers}))
