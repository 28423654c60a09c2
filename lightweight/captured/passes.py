"""What does a network compute in one pass, and which parts of the captured step does it do it with?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from lightweight.preload import peft  # isort: skip  # before Trainer, which imports peft

import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer

from lightweight.captured import attention, flash, probes, temporary
from lightweight.captured.agreement import Tolerance
from lightweight.captured.cross_entropy import linear_cross_entropy
from lightweight.captured.flash import Sequences
from lightweight.captured.frozen import Lean
from lightweight.captured.offload import Offload
from lightweight.captured.packing import Buffers
from lightweight.captured.parts import PartError, Parts
from lightweight.internals import transformers as transformers_internals
from lightweight.methods import Method

NOTHING = Parts(packing=False, attention=False, loss="model", lean=False)
"""A step of the model's own."""


class Passes:
    """The forward passes of a trainer's network, with `parts` of the captured step in it."""

    def __init__(self, trainer: Trainer, method: Method) -> None:
        """`method`: as the trial's device runs it."""
        network: Any = trainer.model
        self.network = network
        # without peft around it; the adapters are inside
        self.model: Any = network.get_base_model() if isinstance(network, peft.PeftModel) else network
        self.parts = NOTHING
        self._device = torch.device(trainer.args.device)
        self._counts_tokens = trainer.model_accepts_loss_kwargs
        arguments = method.training_arguments
        self._dtype = torch.float16 if arguments.get("fp16") else torch.bfloat16 if arguments.get("bf16") else None
        self.in_fp32 = False
        dtype: Any = self._dtype or self.model.dtype
        self.on_flash = flash.has_kernels(self._device, dtype) and flash.takes(self.model.config)
        self._lean: Lean | None = None
        self._undo_attention: Callable[[], None] | None = None
        self.recomputed: list[Any] = []
        self.offloaded: list[Any] = []
        self._undo_recompute: Callable[[], None] | None = None
        self._host: Offload | None = None

    @property
    def casts(self) -> bool:
        """Whether passes are under autocast."""
        return self._dtype is not None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """What passes are computed in."""
        if self._dtype is None or self.in_fp32:
            return contextlib.nullcontext()
        # Cast weights that it caches would outlive the pass, in a graph's memory.
        return torch.autocast(self._device.type, self._dtype, cache_enabled=False)

    def use(self, parts: Parts, allowed: Tolerance | None) -> None:
        """Compute with `parts` from now on; `allowed` is what rounding may make of the loss, None where nothing is
        computed that could be asked, in a forecast. Raises PartError, and what else a part raises that cannot be
        had."""
        self._lean_on(False)
        if self._undo_attention is not None:
            self._undo_attention()
        self._undo_attention = None
        if parts.loss == "chunked" and self.model.base_model is self.model:
            raise PartError("it is not said which part of the network is before its head")
        self.parts = parts
        if parts.attention:
            self._undo_attention = attention.install(self.model)
        if allowed is not None and parts.loss != "model":
            probes.check_loss(self.network, self.autocast, allowed)
        if allowed is not None and parts.loss == "chunked":
            probes.check_head(self.model, self.autocast)
        self._lean_on(parts.lean)

    def recompute(self, count: int, *, offload: int = 0, keeps_random_numbers: bool) -> None:
        """Have the first `count` layers computed again in the backward pass from now on, and what the first `offload`
        layers keep lie in the host's memory. Where that `keeps_random_numbers` of torch's, they drop what they dropped
        before; no CUDA graph can."""
        if self._undo_recompute is not None:
            self._undo_recompute()
        layers = transformers_internals.recomputable_layers(self.model)
        self.recomputed, self.offloaded = layers[:count], layers[:offload]
        again = transformers_internals.recomputing(keeps_random_numbers=keeps_random_numbers)
        called: dict[Any, Callable[..., Any]] = dict.fromkeys(self.recomputed, again)
        self._host = Offload(self.model, self.offloaded) if self.offloaded else None
        if self._host is not None:
            called |= {layer: self._host.calling(layer, called.get(layer)) for layer in self.offloaded}
        self._undo_recompute = transformers_internals.called_by(called)

    def as_the_trainers(self) -> contextlib.AbstractContextManager[None]:
        """Inside, no layer's activations go to the host."""
        return contextlib.nullcontext() if self._host is None else self._host.resting()

    def changing_layer(self, buffers: Buffers) -> str | None:
        """The class of a layer that gives another result when it is computed again, by dropout that no seed of ours
        decides; None where all that are computed again repeat themselves. Waits for the device."""
        changing: list[str] = []

        def compute_again(layer: Any, arguments: Any, options: Any, result: Any) -> None:
            again = layer.forward(*arguments, **options)
            first, second = (each[0] if isinstance(each, tuple) else each for each in (result, again))
            if not torch.equal(first, second):
                changing.append(type(layer).__name__)

        hooks = [layer.register_forward_hook(compute_again, with_kwargs=True) for layer in self.recomputed]
        try:
            with torch.no_grad():
                self.loss(buffers, 0)
        finally:
            for hook in hooks:
                hook.remove()
        return changing[0] if changing else None

    def undo_lean(self) -> None:
        """Give frozen layers their own forward passes back."""
        self._lean_on(False)

    @contextlib.contextmanager
    def fp32(self) -> Iterator[None]:
        """Inside, passes are computed in fp32 in the place of halves."""
        self.in_fp32, lean = True, self._lean is not None
        try:
            with temporary.in_fp32(self.network):
                self._lean_on(lean)
                yield
        finally:
            self.in_fp32 = False
            self._lean_on(lean)

    def _lean_on(self, wanted: bool) -> None:
        """Give frozen layers lean forward passes, for the number formats that they have now; or their own."""
        if self._lean is not None:
            self._lean.undo()
        self._lean = Lean(self.model) if wanted else None

    def loss(self, buffers: Buffers, index: int) -> torch.Tensor:
        """The share of pass `index` in the loss of the step that `buffers` hold: a scalar."""
        if self._lean is not None:
            self._lean.roll()
        with self.autocast():
            return self._loss(buffers, index)

    def logits(self, buffers: Buffers, index: int) -> torch.Tensor:
        """What the network makes of pass `index`: [rows, time, vocabulary], without virtual tokens before the row."""
        inputs, dialogues = self._inputs(buffers, index)
        with self._attending(dialogues, buffers, index), self.autocast():
            logits: torch.Tensor = self.network(**inputs, use_cache=False).logits[:, -buffers.shape.time :]
        return logits

    def _loss(self, buffers: Buffers, index: int) -> torch.Tensor:
        inputs, dialogues = self._inputs(buffers, index)
        answers, targets, weights = buffers.answers[index], buffers.targets[index], buffers.weights[index]
        if self.parts.loss == "logits":
            logits = self.logits(buffers, index)
            chosen = logits.flatten(0, 1).index_select(0, answers).float()
            return (cross_entropy(chosen, targets, reduction="none") * weights).sum()
        with self._attending(dialogues, buffers, index):
            if self.parts.loss == "model":
                return self._models_own_loss(inputs, buffers, index)
            hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
            head = self.model.get_output_embeddings()
            chosen = hidden.flatten(0, 1).index_select(0, answers)
            return linear_cross_entropy(chosen, head.weight, head.bias, targets, weights)

    def _inputs(self, buffers: Buffers, index: int) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """What the network is given for pass `index`, and which dialogue each token is of, where that says more."""
        inputs = {"input_ids": buffers.input_ids[index], "attention_mask": buffers.attention_mask[index]}
        if not self.parts.packing:
            return inputs, None
        return inputs | {"position_ids": buffers.position_ids[index]}, buffers.dialogues[index]

    @contextlib.contextmanager
    def _attending(self, dialogues: torch.Tensor | None, buffers: Buffers, index: int) -> Iterator[None]:
        """Inside, attention is that of pass `index`: apart where `dialogues` are, and on flash kernels where it can."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(attention.packed(dialogues))
            if self.on_flash and self.parts.attention:
                shape = buffers.shape
                joined = Sequences(buffers.ends[index], shape.longest) if shape.sequences else None
                stack.enter_context(attention.on_flash(joined))
            yield

    def _models_own_loss(self, inputs: dict[str, torch.Tensor], buffers: Buffers, index: int) -> torch.Tensor:
        labels = buffers.labels[index]
        loss: torch.Tensor
        if self._counts_tokens:
            loss = self.network(**inputs, labels=labels, num_items_in_batch=buffers.count, use_cache=False).loss
            return loss
        loss = self.network(**inputs, labels=labels, use_cache=False).loss
        return loss / buffers.shape.passes
