"""What is a fine-tuning method? A peft config, a quantization config, overrides of TrainingArguments, and the author's
own functions and classes where these do not suffice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightweight import importable
from lightweight.preload import peft

if TYPE_CHECKING:  # the Trainer takes seconds to import, and torch's optimizers are nothing to wait for here
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

Precision = Literal["fp32", "fp16", "bf16", "half"]
"""`half` is bf16 on a target that has it and fp16 elsewhere; a `Trial` knows which."""


LEARNING_RATE = 5e-5
"""What a schedule begins at where TrainingArguments say nothing."""


OWN_CODE = ("optimizer", "compute_loss", "trainer", "callbacks", "data_collator", "transform")
"""The fields of a Method that take code of its author's."""

CAPTURED_WITH = ("optimizer", "transform")
"""Those of them that a captured step can have: its check compares what they make of it with the Trainer's step."""


ELEMENT_BY_ELEMENT = ("torch.optim.adamw:AdamW", "torch.optim.sgd:SGD")
"""Optimizers that do with a shard of a weight what they would with that part of it; `training_arguments` says so of
`optim`."""


LEFT_TO_THE_CALLER: Mapping[str, tuple[tuple[str, ...], str]] = {
    "eva": (
        ("transform",),
        "init_lora_weights='eva' is computed from data, and without them peft begins as LoRA does: have a transform "
        "call peft's initialize_lora_eva_weights",
    ),
    "corda": (
        ("transform",),
        "init_lora_weights='corda' is computed from data: leave out adapter, and have a transform call peft's "
        "preprocess_corda and get_peft_model",
    ),
    "lora_ga": (
        ("transform",),
        "init_lora_weights='lora_ga' is computed from data, and without them peft begins as LoRA does: leave out "
        "adapter, and have a transform call peft's preprocess_loraga and get_peft_model",
    ),
}
"""What peft leaves to its caller, by how the adapter begins: the fields that could do it, and what to do."""


class MethodError(ValueError):
    """A method that asks for something that is not supported. The message names it and the mend."""


@dataclass(frozen=True, kw_only=True)
class CapturedStep:
    """One optimizer step as one CUDA graph. Each part has a switch, so its gain can be measured.

    A part that would make the step differ from the Trainer's is switched off before training, and the record says so.

    Attributes:
        attention: "sdpa" runs every attention on flash kernels if the card has them, else through
            `scaled_dot_product_attention`, without a mask if attention is only causal. "model" is the model's own.
        loss: "chunked" never holds all logits at once. "model" is the model's own.
        packing: Whether several dialogues share a row.
        lean: Whether less of the forward pass of frozen layers is kept; what is cheap is recomputed.
        graph: Whether the step is captured. False runs the same step without a graph.
        compile: Whether torch.compile compiles it. None decides from the number of steps.
        upcast: Whether the norms, embeddings and head of a quantized model are held in fp32, as
            `prepare_model_for_kbit_training` does.
        recompute: How many layers, the first ones, are recomputed in the backward pass instead of kept.
        offload: How many layers, the first ones, have what they keep for the backward pass copied to the host's memory
            and back; gates are recomputed instead. With any, a frozen embedding is on the host, too.

    Raises:
        ValueError: For packing with the model's own attention, which supports one dialogue per row, for layers that are
            compiled and also recomputed or offloaded, and for a number of layers that is none.
    """

    attention: Literal["model", "sdpa"] = "sdpa"
    loss: Literal["model", "chunked"] = "chunked"
    packing: bool = True
    lean: bool = True
    graph: bool = True
    compile: bool | None = None
    upcast: bool = False
    recompute: int = 0
    offload: int = 0

    def __post_init__(self) -> None:
        for name in ("recompute", "offload"):
            layers = getattr(self, name)
            if type(layers) is not int or layers < 0:
                raise ValueError(f"{name}={layers!r}: is not a number of layers: give 0 or more")
            if layers and self.compile:
                raise ValueError(f"{name} needs compile=None or False: a compiler decides by itself what layers keep")
        if self.packing and self.attention == "model":
            raise ValueError("packing needs attention='sdpa': the model's own attention supports one dialogue per row")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to fine-tune.

    `optimizer` to `transform` are the author's own code: functions and classes at the top level of a module, or
    functools.partial of one. Held-out losses are always computed by the suite.

    Attributes:
        name: What it is called.
        adapter: A config of peft. None trains every parameter.
        quantization: A config of transformers. None leaves the weights as they are.
        weights_dtype: The number format of unquantized weights. "half" is bfloat16 if the target has it, else float16;
            4-bit weights are then computed with in the same format.
        training_arguments: Overrides of transformers' `TrainingArguments`: mixed precision (`fp16`, `bf16`), batch
            size, accumulation, gradient checkpointing. Everything else is the Trainer's default: AdamW, learning rate
            5e-5, linear decay.
        step: What runs an optimizer step: HF `Trainer`, or the captured step; a `CapturedStep` switches its parts.
        library: What loads the network and puts the adapter on: transformers with peft, or unsloth, which then trains
            with the Trainer's steps.
        optimizer: A function of the network (with its adapter) and the TrainingArguments, whose `learning_rate` it
            should use, that returns an optimizer. Or, as the Trainer's `optimizer_cls_and_kwargs`, a class and its
            keywords; it gets `learning_rate` as `lr`.
        compute_loss: The Trainer's `compute_loss_func`: outputs of the network, labels and `num_items_in_batch` to a
            scalar.
        trainer: A subclass of the Trainer.
        callbacks: Functions or classes that return a TrainerCallback. They are called anew for every trial.
        data_collator: A function of the suite's collator that returns the one to train with.
        transform: A function of the network, with its adapter, that returns the one to train.
        changed: What has been set from outside, by a command line or a test, by the names of `Settings`.

    Raises:
        MethodError: For code that another process cannot import or that the captured step does not support, and for
            unsloth without anything to do. It is a ValueError.
    """

    name: str
    adapter: peft.PeftConfig | None = None
    quantization: QuantizationConfigMixin | None = None
    weights_dtype: Literal["float32", "float16", "bfloat16", "half"] = "float32"
    training_arguments: Mapping[str, Any] = field(default_factory=dict)
    step: Literal["trainer", "captured"] | CapturedStep = "trainer"
    library: Literal["peft", "unsloth"] = "peft"
    optimizer: (
        Callable[[Any, TrainingArguments], torch.optim.Optimizer]
        | tuple[type[torch.optim.Optimizer], Mapping[str, Any]]
        | None
    ) = None
    compute_loss: Callable[..., torch.Tensor] | None = None
    trainer: type[Trainer] | None = None
    callbacks: tuple[Callable[[], TrainerCallback], ...] = ()
    data_collator: Callable[[Any], Callable[..., dict[str, Any]]] | None = None
    transform: Callable[[Any], Any] | None = None
    changed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.library == "unsloth" and not (self.step == "trainer" and isinstance(self.adapter, peft.LoraConfig)):
            raise MethodError(
                f"method {self.name}: unsloth trains LoRA with the Trainer's steps only: give it both, or use peft"
            )
        self._check_own_code()

    def _check_own_code(self) -> None:
        for name, value in self.own_code.items():
            for part in value if isinstance(value, tuple) else (value,):
                if name == "optimizer" and isinstance(part, Mapping):
                    continue
                try:
                    importable.described(part)
                except ValueError as error:
                    raise MethodError(f"method {self.name}: its {name} {error}") from error
            if self.library == "unsloth":
                raise MethodError(f"method {self.name}: unsloth does not support your own {name}: use peft")
            if self.step != "trainer" and name not in CAPTURED_WITH:
                raise MethodError(
                    f"method {self.name}: the captured step does not run its {name}: let the Trainer run the steps, by "
                    "step='trainer'"
                )
        if isinstance(self.optimizer, tuple) and not (
            len(self.optimizer) == 2 and isinstance(self.optimizer[0], type) and isinstance(self.optimizer[1], Mapping)
        ):
            raise MethodError(f"method {self.name}: its optimizer is a tuple: give (class, keywords), or a function")
        if not isinstance(self.callbacks, tuple):
            raise MethodError(f"method {self.name}: its callbacks are not a tuple: give (callback,)")
        if self.trainer is not None and "transformers.trainer" not in {of.__module__ for of in _lineage(self.trainer)}:
            raise MethodError(f"method {self.name}: its trainer is not a subclass of transformers' Trainer: give one")

    @property
    def own_code(self) -> dict[str, Any]:
        """Those fields of OWN_CODE that it has, by name."""
        return {name: value for name in OWN_CODE if (value := getattr(self, name))}

    @property
    def left_out(self) -> str | None:
        """What peft leaves to its caller and nothing in the method does, with the mend; None if there is nothing."""
        begins = getattr(self.adapter, "init_lora_weights", None)
        code, told = LEFT_TO_THE_CALLER.get(begins, ((), "")) if isinstance(begins, str) else ((), "")
        return told if told and not any(getattr(self, name) for name in code) else None

    @property
    def moves_ranks(self) -> bool:
        """Whether its adapter is AdaLoRA's, which moves ranks between layers after every step."""
        return isinstance(self.adapter, peft.AdaLoraConfig)

    @property
    def not_for_ranks(self) -> list[str]:
        """Those fields of OWN_CODE with which several ranks may train differently from one. With a captured step each
        rank holds the whole network. With the Trainer's steps it may be sharded, so an optimizer must work element by
        element."""
        allowed: tuple[str, ...] = CAPTURED_WITH if self.captured_step is not None else ()
        if isinstance(self.optimizer, tuple) and importable.import_path(self.optimizer[0]) in ELEMENT_BY_ELEMENT:
            allowed = (*allowed, "optimizer")
        return [name for name in self.own_code if name not in allowed]

    @property
    def precision(self) -> Precision:
        """The number format of matrix products: autocast's, else that of the weights."""
        if self.training_arguments.get("fp16"):
            return "fp16"
        if self.training_arguments.get("bf16"):
            return "bf16"
        names: dict[str, Precision] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "half": "half"}
        return names[self.weights_dtype]

    @property
    def captured_step(self) -> CapturedStep | None:
        """The captured step with its switches; None where the Trainer runs the steps."""
        if isinstance(self.step, CapturedStep):
            return self.step
        return CapturedStep() if self.step == "captured" else None

    @property
    def uses_bf16(self) -> bool:
        """Whether any part of the method asks for bfloat16 arithmetic."""
        compute = getattr(self.quantization, "bnb_4bit_compute_dtype", None)
        return self.precision == "bf16" or "bfloat16" in str(compute)

    @property
    def sequences_per_pass(self) -> int:
        """Sequences of one forward pass; the Trainer's default is 8."""
        return int(self.training_arguments.get("per_device_train_batch_size", 8))

    @property
    def passes_per_step(self) -> int:
        """Forward passes of one optimizer step, whose gradients are accumulated."""
        return int(self.training_arguments.get("gradient_accumulation_steps", 1))

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimizer step: those of a forward pass times the accumulation."""
        return self.sequences_per_pass * self.passes_per_step

    @property
    def expected_cost(self) -> tuple[bool, ...]:
        """Orders methods from the fastest to the slowest if nothing was measured.

        4-bit weights are dequantized in every pass, checkpointing computes each forward pass twice, fp32 does not use
        the tensor cores, the Trainer's steps are launch-bound, and training every parameter moves optimizer state for
        all of them. This is the order on an H200 (experiments/records), where lora is 1.7 times as fast as baseline and
        qlora a tenth, and on an H100, where either is faster captured.
        """
        step = self.captured_step
        checkpointing = bool(
            self.training_arguments.get("gradient_checkpointing") or (step and (step.recompute or step.offload))
        )
        fp32 = self.precision == "fp32"
        return self.quantization is not None, checkpointing, fp32, step is None, self.adapter is None

    def with_batch(self, sequences: int) -> Method:
        """The method with `sequences` in a forward pass."""
        return replace(self, training_arguments={**self.training_arguments, "per_device_train_batch_size": sequences})

    def with_at_most(self, sequences: int) -> Method:
        """The method with at most `sequences` in a step, in full passes."""
        if self.sequences_per_step <= sequences:
            return self
        method = self.with_batch(min(self.sequences_per_pass, sequences))
        passes = sequences // method.sequences_per_pass
        return replace(method, training_arguments={**method.training_arguments, "gradient_accumulation_steps": passes})

    def with_passes(self, passes: int) -> Method:
        """The method with the sequences of a step in `passes` forward passes. Raises MethodError if they would not be
        equal."""
        if passes == self.passes_per_step:
            return self
        sequences, left = divmod(self.sequences_per_step, passes)
        if left:
            raise MethodError(
                f"method {self.name}: {self.sequences_per_step} sequences a step cannot be divided into {passes} "
                "equal passes"
            )
        arguments = {"per_device_train_batch_size": sequences, "gradient_accumulation_steps": passes}
        return replace(self, training_arguments={**self.training_arguments, **arguments})

    def recomputing(self, layers: int) -> Method:
        """The method with `layers` of its captured step recomputed in the backward pass."""
        if self.captured_step is None or layers == self.captured_step.recompute:
            return self
        return replace(self, step=replace(self.captured_step, recompute=layers))

    def offloading(self, layers: int) -> Method:
        """The method with the activations of so many layers of its captured step on the host."""
        if self.captured_step is None or layers == self.captured_step.offload:
            return self
        return replace(self, step=replace(self.captured_step, offload=layers))

    def with_learning_rate(self, rate: float) -> Method:
        """The method with `rate` as its learning rate."""
        return replace(self, training_arguments={**self.training_arguments, "learning_rate": rate})

    def scaled(self, world_size: int, scale: str) -> Method:
        """The method with a step that grows with the number of ranks, so each rank sees what one alone would.

        "batch" keeps the learning rate. "batch-sqrt" multiplies it by the square root of the number of ranks, the rule
        for Adam (https://arxiv.org/abs/2205.10287); "batch-linear" by the number, the rule for SGD
        (https://arxiv.org/abs/1706.02677). "fixed" does not change the step.
        """
        if world_size == 1 or scale == "fixed":
            return self
        arguments = dict(self.training_arguments)
        arguments["gradient_accumulation_steps"] = self.passes_per_step * world_size
        power = {"batch": 0.0, "batch-sqrt": 0.5, "batch-linear": 1.0}[scale]
        if power:
            arguments["learning_rate"] = arguments.get("learning_rate", LEARNING_RATE) * world_size**power
        return replace(self, training_arguments=arguments, changed={**self.changed, "scale": scale})

    def to_be_sharded(self) -> Method:
        """The method with weights that FSDP can shard. It shards floating-point tensors, so packed 4-bit weights are
        stored as such."""
        storage = "float16" if self.weights_dtype == "half" else self.weights_dtype
        return replace(self, quantization=_with_4bit(self.quantization, bnb_4bit_quant_storage=storage))

    def on_rank(self, world_size: int) -> Method:
        """The method as each of `world_size` processes runs it, so together they see the sequences of a step: at most
        as many per pass as the method has, in as few passes as possible."""
        if world_size == 1:
            return self
        sequences = -(-self.sequences_per_step // world_size)
        passes = -(-sequences // self.sequences_per_pass)
        arguments = {
            **self.training_arguments,
            "per_device_train_batch_size": -(-sequences // passes),
            "gradient_accumulation_steps": passes,
        }
        return replace(self, training_arguments=arguments)

    def on_cpu(self) -> Method:
        """The method as a CPU can run it: in fp32, without fp16 mixed precision (accelerate refuses it there) and
        tf32."""
        arguments = {name: value for name, value in self.training_arguments.items() if name not in ("fp16", "tf32")}
        return replace(
            self,
            quantization=_with_4bit(self.quantization, bnb_4bit_compute_dtype="float32"),
            weights_dtype="float32" if self.weights_dtype == "half" else self.weights_dtype,
            training_arguments=arguments,
        )

    def on_gpu(self, *, bf16: bool) -> Method:
        """The method as a GPU with or without bf16 runs it: `half` becomes one of the two formats."""
        if self.weights_dtype != "half":
            return self
        dtype: Literal["bfloat16", "float16"] = "bfloat16" if bf16 else "float16"
        quantization = _with_4bit(self.quantization, bnb_4bit_compute_dtype=dtype)
        return replace(self, quantization=quantization, weights_dtype=dtype)


def _lineage(of: Any) -> tuple[type, ...]:
    return of.__mro__ if isinstance(of, type) else ()


def _with_4bit(quantization: QuantizationConfigMixin | None, **settings: str) -> QuantizationConfigMixin | None:
    """`quantization` with other `settings` where it is to 4 bits."""
    if isinstance(quantization, BitsAndBytesConfig) and quantization.load_in_4bit:
        return BitsAndBytesConfig(**{**quantization.to_dict(), **settings})
    return quantization
