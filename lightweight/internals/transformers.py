"""What is private or patched in transformers: read in 5.17 and 5.23.

`Trainer` is taken as it comes: importing it imports peft, which `lightweight.preload` must have done before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback
    from transformers.utils.quantization_config import QuantizationConfigMixin


class TrainerHooks:
    """Public names for what a Trainer's subclass overrides: to be the base class before `transformers.Trainer`.

    The Trainer has callbacks for steps and epochs, and none for these. transformers/trainer.py.
    """

    def run_epoch(self, *arguments: Any, **options: Any) -> None:
        """One epoch of training; model and number of the epoch come first."""
        super()._run_epoch(*arguments, **options)  # type: ignore[misc]

    def train_sampler(self, train_dataset: Any = None) -> Any:
        """In which order rows are drawn."""
        return super()._get_train_sampler(train_dataset)  # type: ignore[misc]

    def write_weights(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write what `save_model` has gathered, in `state_dict`, into a folder."""
        super()._save(output_dir, state_dict)  # type: ignore[misc]

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        self.run_epoch(*arguments, **options)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.train_sampler(train_dataset)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.write_weights(output_dir, state_dict)


def save_random_numbers(trainer: Any, folder: Path) -> None:
    """Write a checkpoint's file of what random numbers come next, on this rank. transformers/trainer.py."""
    trainer._save_rng_state(str(folder))


def load_random_numbers(trainer: Any, checkpoint: Path) -> None:
    """Let random numbers go on as when `checkpoint` was saved. Ibid."""
    trainer._load_rng_state(str(checkpoint))


def save_in_checkpoint(trainer: Any, folder: Path) -> None:
    """`save_model` as the Trainer calls it for a checkpoint, when nothing is pushed to the hub. Ibid."""
    trainer.save_model(str(folder), _internal_call=True)


@contextmanager
def losses_computed_in(trainer: Any, context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside, the trainer computes losses within `context()`. In training the network that accelerate has prepared
    brings its own. Ibid., `compute_loss_context_manager`."""
    with mock.patch.object(trainer, "compute_loss_context_manager", context):
        yield


def feed(trainer: Any, batches: Sequence[Any]) -> None:
    """Have the trainer train on `batches` as they are, with no loader around them. Ibid., `get_train_dataloader`."""
    trainer.get_train_dataloader = lambda: batches


def attention_of(model: Any) -> Any:
    """What transformers' registries know the attention of `model` by. transformers/configuration_utils.py."""
    return model.config._attn_implementation


def say_attention(model: Any, name: Any) -> None:
    """Have masks made as for the attention `name`, whatever the model's own code asks for; `set_attn_implementation`
    refuses models that have no choice. Ibid."""
    model.config._attn_implementation = name


def rotation_of(module: Any) -> tuple[Any, Callable[[Any], Callable[[], None]]]:
    """By what an attention turns queries and keys, None where it has nothing of the kind, and what puts another
    function in its place and gives back what undoes that: a name of its modelling module, which all attentions there
    look up. transformers/models/*/modeling_*.py."""
    names: dict[str, Any] = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
    name = "apply_rotary_pos_emb"

    def replace(function: Any) -> Callable[[], None]:
        own, names[name] = names[name], function

        def undo() -> None:
            names[name] = own

        return undo

    looked_up = getattr(getattr(inspect.unwrap(type(module).forward), "__code__", None), "co_names", ())
    return (names.get(name) if name in looked_up else None), replace


def layers_not_split(model: Any) -> set[str]:
    """The classes of the layers a model consists of: that no device map splits. transformers/modeling_utils.py."""
    return set(model._no_split_modules or ())


def recomputable_layers(model: Any) -> list[Any]:
    """The layers of a network, in order, that can be computed again in the backward pass one by one.
    transformers/modeling_layers.py, `GradientCheckpointingLayer`."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute(layers: Sequence[Any], *, keeps_random_numbers: bool) -> Callable[[], None]:
    """Have `layers` computed again in the backward pass; what is returned undoes that. torch then gives their second
    passes the random numbers of their first, where it `keeps_random_numbers`, which no CUDA graph can. Ibid."""
    return called_by(dict.fromkeys(layers, recomputing(keeps_random_numbers=keeps_random_numbers)))


def recomputing(*, keeps_random_numbers: bool) -> Callable[..., Any]:
    """What a layer is called by to be computed again in the backward pass, see `recompute`."""
    from torch.utils.checkpoint import checkpoint

    return partial(checkpoint, use_reentrant=False, preserve_rng_state=keeps_random_numbers)


def called_by(functions: Mapping[Any, Callable[..., Any]]) -> Callable[[], None]:
    """Have each of these layers called in training by a function that is given its forward pass, a `partial` with what
    it takes by name, and the rest of what it takes; what is returned undoes that. Ibid."""
    before = [(layer, layer.gradient_checkpointing, vars(layer).get(_CALLED_BY)) for layer in functions]
    for layer, function in functions.items():
        layer.gradient_checkpointing = True
        setattr(layer, _CALLED_BY, function)

    def undo() -> None:
        for layer, was, by in before:
            layer.gradient_checkpointing = was
            setattr(layer, _CALLED_BY, by)

    return undo


def standing_in(layer: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """What to put in the place of a layer's `forward` for another one to be called as its own is: 5.17 sees to
    `called_by` around it, 5.23 within the class's own, which is then not called. Ibid."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not isinstance(layer, GradientCheckpointingLayer) or "__call__" in vars(GradientCheckpointingLayer):
        return forward

    def called(*arguments: Any, **options: Any) -> Any:
        if layer.gradient_checkpointing and layer.training:
            return getattr(layer, _CALLED_BY)(partial(forward, **options), *arguments)
        return forward(*arguments, **options)

    return called


_CALLED_BY = "_gradient_checkpointing_func"


@contextmanager
def causal_masks_ignored_by(decide: Callable[..., bool]) -> Iterator[None]:
    """Inside, `decide` says whether causality alone says what a mask would; it is given transformers' own function to
    ask, and then its arguments, the padding mask first. transformers/masking_utils.py."""
    from transformers import masking_utils

    own = masking_utils._ignore_causal_mask_sdpa

    def asked(*arguments: Any, **options: Any) -> bool:
        return decide(own, *arguments, **options)

    with mock.patch.object(masking_utils, "_ignore_causal_mask_sdpa", asked):
        yield


def quantize_shapes(network: PreTrainedModel, quantization: QuantizationConfigMixin) -> None:
    """Give a network on the meta device the layers that it has once its weights are loaded and quantized.
    `from_pretrained` alone does so, and wants the weights."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer: Any = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=network, device_map=None)
    network.hf_quantizer = quantizer
    quantizer.postprocess_model(network)


def loaded_one_by_one() -> AbstractContextManager[Any]:
    """Inside, weights are loaded into memory of their own, and not into one block of all: what of them then leaves the
    device gives its memory back. transformers/modeling_utils.py, `caching_allocator_warmup`."""
    from transformers import modeling_utils

    return mock.patch.object(modeling_utils, "caching_allocator_warmup")


def call_first(trainer: Trainer, callback: TrainerCallback) -> None:
    """Add a callback before all others, where `add_callback` adds it after them."""
    trainer.callback_handler.callbacks.insert(0, callback)


def draw_curves_in(trainer: Trainer, folder: Path) -> None:
    """Have TensorBoard's callback, where there is one, write to `folder` unless the environment names another: a folder
    can be given to the class alone, which the Trainer makes itself."""
    from transformers.integrations.integration_utils import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder)


def bar_of(progress: ProgressCallback) -> Any:
    """The tqdm bar of a training that has begun, on the one rank that shows it; else None."""
    return progress.training_bar


def begin_bar_at(progress: ProgressCallback, step: int) -> None:
    """Have the bar reckon the time that is left from the steps after `step`, where a training goes on."""
    bar = bar_of(progress)
    bar.initial = bar.n = bar.last_print_n = progress.current_step = step
