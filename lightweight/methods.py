"""How a model is trained: a peft config, a quantization config and TrainingArguments overrides, in their own
vocabulary, and where these do not say it, functions and classes of one's own, in the Trainer's.

`BASELINE`, `LORA` and `QLORA` are the settings of the four original scripts. A variant is made with
`dataclasses.replace`, a new method by writing one `Method`. `*_CAPTURED` train the same with the captured step.
"""

from __future__ import annotations

import copy
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightweight import importable, names
from lightweight.internals import peft as peft_internals
from lightweight.models import Model, configuration, ran_out, reason, skeleton
from lightweight.preload import peft

from peft.tuners.tuners_utils import BaseTunerLayer  # isort: skip  # after preload, which decides how peft is imported

if TYPE_CHECKING:  # the Trainer takes seconds to import, and torch's optimizers are nothing to wait for here
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

Precision = Literal["fp32", "fp16", "bf16", "half"]
"""`half` is bf16 on a target that has it and fp16 elsewhere; a `Trial` knows which."""


QUERIES_AND_VALUES = {"q_proj", "v_proj"}
"""What LoRA was first put on (https://arxiv.org/abs/2106.09685, section 4.2), as most architectures call it."""


OWN_CODE = ("optimizer", "compute_loss", "trainer", "callbacks", "data_collator", "transform")
"""The fields of a Method that take code of its author's."""

CAPTURED_WITH = ("optimizer", "transform")
"""Those of them that a captured step can have: its check compares what they make of it with the Trainer's step."""


ELEMENT_BY_ELEMENT = ("torch.optim.adamw:AdamW", "torch.optim.sgd:SGD")
"""Optimizers that do with a shard of a weight what they would with that part of it; `arguments` says so of `optim`."""


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
    "ADALORA": (
        ("callbacks", "trainer"),
        "AdaLoRA gives its ranks to the layers by update_and_allocate, which the Trainer does not call: have a "
        "callback do it, on_optimizer_step",
    ),
}
"""What peft leaves to its caller, by the adapter's beginning or type: the fields that could do it, and what to do."""


class MethodError(ValueError):
    """A method that asks for something that what runs it does not do. The message names it and the mend."""


@dataclass(frozen=True, kw_only=True)
class CapturedStep:
    """One optimizer step as one CUDA graph, and what is changed in it beside that; each part has a switch, so that what
    it buys can be measured.

    `attention` "sdpa" runs every attention on flash kernels where the card has them, and else through
    `scaled_dot_product_attention`, without a mask where causality is all there is to say. `loss` "chunked" never holds
    the logits whole. `packing` puts several dialogues into one row.
    `lean` keeps less of the forward pass of frozen layers and computes again what is cheap. `graph` False runs the same
    step uncaptured. `compile` None decides from the number of steps. `upcast` holds the norms, embeddings and head of a
    quantized model in fp32, as `prepare_model_for_kbit_training` does. A part that would make the step another one than
    the Trainer's is given up before training, and the record says so. `recompute` is how many of the network's layers,
    the first ones, are computed again in the backward pass instead of kept: those that are needed last there. Raises
    ValueError for packing on the model's own attention, which knows one dialogue a row, and for layers that are both
    compiled and computed again.
    """

    attention: Literal["model", "sdpa"] = "sdpa"
    loss: Literal["model", "chunked"] = "chunked"
    packing: bool = True
    lean: bool = True
    graph: bool = True
    compile: bool | None = None
    upcast: bool = False
    recompute: int = 0

    def __post_init__(self) -> None:
        if self.recompute and self.compile:
            raise ValueError("recompute needs compile=None or False: a compiled layer is not computed again")
        if self.packing and self.attention == "model":
            raise ValueError("packing needs attention='sdpa': the model's own attention knows one dialogue a row")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to fine-tune.

    `adapter` None trains every parameter. `weights_dtype` is what unquantized weights are held in; "half" is bfloat16
    where the target has it, else float16, and 4-bit weights are then computed with in the same format.
    `training_arguments` override transformers' `TrainingArguments`; mixed precision (`fp16`, `bf16`), batch size,
    accumulation and gradient checkpointing are said there. Everything not said is the Trainer's default: AdamW,
    learning rate 5e-5, linear decay. `step` is what runs an optimizer step: HF `Trainer`, or the captured step, whose
    parts a `CapturedStep` switches. `library` is what loads the network and puts its adapter on: transformers with
    peft, or a peer of theirs, which then trains by the Trainer's steps. `changed` is what `Settings` have changed of
    what its author said, by their names.

    What these do not say is said in code: functions and classes at the top level of a module, or functools.partial of
    one. `optimizer` makes the optimizer from the network, which has its adapter on, and the TrainingArguments, whose
    `learning_rate` it is to take; or it is the Trainer's `optimizer_cls_and_kwargs`, a class and its keywords, which
    gets `learning_rate` as `lr`. `compute_loss` is the Trainer's `compute_loss_func`: outputs of the network, labels
    and `num_items_in_batch` to a scalar. `trainer` is a subclass of the Trainer, `callbacks` are made anew for every
    trial, of classes as they are. `data_collator` is given the suite's own collator and returns the one to train with.
    `transform` is given the network, with its adapter on, and returns the one to train. Held-out losses are the
    suite's, whatever these do.

    Raises MethodError, a ValueError, for code that no other process could import, for code that the captured step does
    not run, and for a peer that the method's other parts leave nothing to do.
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
            raise MethodError(f"method {self.name}: unsloth trains LoRA by the Trainer's steps: give it both, or peft")
        self._check_own_code()
        for value, (code, told) in LEFT_TO_THE_CALLER.items():
            said = (getattr(self.adapter, "init_lora_weights", None), getattr(self.adapter, "peft_type", None))
            if value in said and not any(getattr(self, name) for name in code):
                raise MethodError(f"method {self.name}: {told}")

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
                raise MethodError(f"method {self.name}: unsloth trains with no {name} of one's own: give peft")
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
            raise MethodError(f"method {self.name}: its callbacks are no tuple: give (callback,)")
        if self.trainer is not None and "transformers.trainer" not in {of.__module__ for of in _lineage(self.trainer)}:
            raise MethodError(f"method {self.name}: its trainer is no subclass of transformers' Trainer: give one")

    @property
    def own_code(self) -> dict[str, Any]:
        """What of OWN_CODE it has, by name."""
        return {name: value for name in OWN_CODE if (value := getattr(self, name))}

    @property
    def not_for_ranks(self) -> list[str]:
        """What of OWN_CODE may have several ranks train otherwise than one. Those of a captured step each hold the
        whole network; FSDP2 replaces the weights by shards, on which an optimizer must work element by element."""
        allowed: tuple[str, ...] = CAPTURED_WITH if self.captured_step is not None else ()
        if isinstance(self.optimizer, tuple) and importable.import_path(self.optimizer[0]) in ELEMENT_BY_ELEMENT:
            allowed = (*allowed, "optimizer")
        return [name for name in self.own_code if name not in allowed]

    @property
    def precision(self) -> Precision:
        """What matrix products are computed in: the autocast format, else that of the weights."""
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
        """Sequences of one forward pass; 8 is the Trainer's default."""
        return int(self.training_arguments.get("per_device_train_batch_size", 8))

    @property
    def passes_per_step(self) -> int:
        """Forward passes of one optimizer step, whose gradients accumulate."""
        return int(self.training_arguments.get("gradient_accumulation_steps", 1))

    @property
    def sequences_per_step(self) -> int:
        """Sequences one optimizer step sees: one forward pass times the accumulation."""
        return self.sequences_per_pass * self.passes_per_step

    @property
    def expected_cost(self) -> tuple[bool, ...]:
        """What orders methods from the fastest to the slowest where nothing was measured.

        4-bit weights are dequantized in every pass, checkpointing computes each forward twice, fp32 leaves the tensor
        cores idle, the Trainer's steps wait for Python, and training every parameter moves optimizer state for all of
        them: in this order on an H200 (experiments/records), where lora is 1.7 times as fast as baseline and qlora a
        tenth, and on an H100, where either is faster captured.
        """
        step = self.captured_step
        checkpointing = bool(self.training_arguments.get("gradient_checkpointing") or (step and step.recompute))
        fp32 = self.precision == "fp32"
        return self.quantization is not None, checkpointing, fp32, step is None, self.adapter is None

    def with_batch(self, sequences: int) -> Method:
        """The method with `sequences` in a forward pass."""
        return replace(self, training_arguments={**self.training_arguments, "per_device_train_batch_size": sequences})

    def with_at_most(self, sequences: int) -> Method:
        """The method with no more than `sequences` in a step, in as many full passes as these make."""
        if self.sequences_per_step <= sequences:
            return self
        method = self.with_batch(min(self.sequences_per_pass, sequences))
        passes = sequences // method.sequences_per_pass
        return replace(method, training_arguments={**method.training_arguments, "gradient_accumulation_steps": passes})

    def with_passes(self, passes: int) -> Method:
        """The method with the sequences of a step in `passes` forward passes. Raises MethodError where they are not
        equal."""
        if passes == self.passes_per_step:
            return self
        sequences, left = divmod(self.sequences_per_step, passes)
        if left:
            raise MethodError(
                f"method {self.name}: {self.sequences_per_step} sequences a step are not {passes} equal passes"
            )
        arguments = {"per_device_train_batch_size": sequences, "gradient_accumulation_steps": passes}
        return replace(self, training_arguments={**self.training_arguments, **arguments})

    def recomputing(self, layers: int) -> Method:
        """The method with so many layers of its captured step computed again in the backward pass."""
        if self.captured_step is None or layers == self.captured_step.recompute:
            return self
        return replace(self, step=replace(self.captured_step, recompute=layers))

    def with_learning_rate(self, rate: float) -> Method:
        """The method with `rate` as what its schedule begins at."""
        return replace(self, training_arguments={**self.training_arguments, "learning_rate": rate})

    def on_rank(self, world_size: int) -> Method:
        """The method as each of `world_size` processes runs it, so that together they see the sequences of a step: no
        more in a pass than the method says, in as few passes as that takes."""
        if world_size == 1:
            return self
        sequences = -(-self.sequences_per_step // world_size)
        passes = -(-sequences // self.sequences_per_pass)
        arguments = {
            **self.training_arguments,
            "per_device_train_batch_size": -(-sequences // passes),
            "gradient_accumulation_steps": passes,
        }
        quantization = self.quantization
        if self.captured_step is None:  # FSDP shards floating-point tensors: packed weights are stored as if they were
            storage = "float16" if self.weights_dtype == "half" else self.weights_dtype
            quantization = _with_4bit(quantization, bnb_4bit_quant_storage=storage)
        return replace(self, training_arguments=arguments, quantization=quantization)

    def adapt(self, network: Any, upcast: bool = True) -> Any:
        """`network`, loaded or on the meta device, with its adapter on, as peft's own documentation does it, and what
        its `transform` makes of that. `upcast` holds what a quantized model leaves unquantized in fp32. Raises
        MethodError where the adapter cannot be put on this architecture, or the transform returns no network."""
        if getattr(network, "is_quantized", False) and upcast:
            network = peft.prepare_model_for_kbit_training(
                network,
                use_gradient_checkpointing=self.training_arguments.get("gradient_checkpointing", False),
                gradient_checkpointing_kwargs=self.training_arguments.get("gradient_checkpointing_kwargs"),
            )
        if self.adapter is not None:
            network = self._with_adapter(network)
        if self.transform is None:
            return network
        transformed = self.transform(network)
        its = f"method {self.name}: its transform {importable.import_path(self.transform)}"
        if not (hasattr(transformed, "named_parameters") and hasattr(transformed, "config")):
            without = ", which has no config" if hasattr(transformed, "named_parameters") else ""
            raise MethodError(f"{its} returns a {type(transformed).__name__}{without}: return the network")
        if not any(weight.requires_grad for weight in transformed.parameters()):
            raise MethodError(f"{its} leaves nothing to train: leave some weights as requires_grad_(True)")
        return transformed

    def _with_adapter(self, network: Any) -> Any:
        adapter = self.adapter_for(network)
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
                f"method {self.name}: its {adapter.peft_type.value} cannot be put on {network.config.model_type} "
                f"({reason(error)}): {mend}"
            ) from error

    def adapter_for(self, network: Any) -> Any:
        """A copy of the adapter for peft to write into. Where it leaves its layers to the architecture
        (`target_modules` None), they are those of peft's own mapping; where that knows none, the projections of queries
        and values, which most of the mapping names; where the network has none of that name, all linear layers. What an
        adapter computes from weights to begin with (PiSSA, OLoRA) it cannot from those of the meta device, and has the
        shapes of any other beginning there."""
        adapter: Any = copy.deepcopy(self.adapter)
        if isinstance(getattr(adapter, "init_lora_weights", None), str) and any(
            w.is_meta for w in network.parameters()
        ):
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

    def named_layers(self, network: Any) -> list[str]:
        """The layers of `network` that the adapter is put on, by their names without their places, for a library that
        takes nothing else. Raises MethodError where that is none, or says more layers than the adapter does."""
        places = [name for name, _ in network.named_modules()]
        adapter = self.adapter_for(network)
        chosen = peft_internals.chosen_layers(adapter, network)
        names = sorted({place.rpartition(".")[2] for place in chosen})
        also = sorted(place for place in places if place.rpartition(".")[2] in names and place not in chosen)
        if also or not names:
            problem = f"{also[0]} has the name of one that it is put on" if also else "there is none of them"
            raise MethodError(
                f"method {self.name}: {self.library} takes layers by name alone, and of target_modules "
                f"{adapter.target_modules!r} {problem}: name layers of which all are meant"
            )
        return names

    def on_cpu(self) -> Method:
        """The method as a CPU can run it: fp16 mixed precision needs a GPU (accelerate refuses it), and so does tf32:
        fp32 there."""
        arguments = {name: value for name, value in self.training_arguments.items() if name not in ("fp16", "tf32")}
        return replace(
            self,
            quantization=_with_4bit(self.quantization, bnb_4bit_compute_dtype="float32"),
            weights_dtype="float32" if self.weights_dtype == "half" else self.weights_dtype,
            training_arguments=arguments,
        )

    def on_gpu(self, *, bf16: bool) -> Method:
        """The method as a GPU with or without bf16 arithmetic runs it: `half` is one of the two formats there."""
        if self.weights_dtype != "half":
            return self
        dtype: Literal["bfloat16", "float16"] = "bfloat16" if bf16 else "float16"
        quantization = _with_4bit(self.quantization, bnb_4bit_compute_dtype=dtype)
        return replace(self, quantization=quantization, weights_dtype=dtype)


def _lineage(of: Any) -> tuple[type, ...]:
    return of.__mro__ if isinstance(of, type) else ()


def check_layers(method: Method, model: Model) -> None:
    """Raise MethodError, in one line, where `model` has not each of the layers that the command line names for the
    adapter of `method`. peft passes over what it does not find, until there is nothing; so it is with a method's own
    names, which may be meant for several architectures. Raises ModelError where there is no network."""
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
    """The names, without their places, of the layers that an adapter has been put on, sorted."""
    layers = (name for name, module in network.named_modules() if isinstance(module, BaseTunerLayer))
    return tuple(sorted({name.rpartition(".")[2] for name in layers}))


def _with_4bit(quantization: QuantizationConfigMixin | None, **settings: str) -> QuantizationConfigMixin | None:
    """`quantization` with other `settings` where it is to 4 bits."""
    if isinstance(quantization, BitsAndBytesConfig) and quantization.load_in_4bit:
        return BitsAndBytesConfig(**{**quantization.to_dict(), **settings})
    return quantization


BASELINE = Method(name="baseline", training_arguments={"per_device_train_batch_size": 8})
"""`before_small` and `before_big` of the original scripts: every parameter in fp32, 8 sequences a step."""

LORA = Method(
    name="lora",
    adapter=peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM, r=8, lora_alpha=32, lora_dropout=0.1, target_modules=None
    ),
    training_arguments={"per_device_train_batch_size": 8, "fp16": True},
)
"""`lightweight_small`: LoRA (https://arxiv.org/abs/2106.09685) of rank 8 on frozen fp32 weights, fp16 autocast. Its
layers are those that peft names for the architecture: of OPT, GPT-Neo and Llama the original's q_proj and v_proj."""

QLORA = Method(
    name="qlora",
    # 'all-linear' is peft's word for every linear layer but the output head
    adapter=peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM, r=8, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear"
    ),
    quantization=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float16"),
    training_arguments={
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "fp16": True,
    },
)
"""`lightweight_big`: LoRA on weights in NF4 (QLoRA, https://arxiv.org/abs/2305.14314), 4 passes of 2 sequences a step,
each forward computed twice."""

# All parameters are trained, so none is frozen to be held in half precision, and fp32 is what the optimizer adds its
# small updates to: pure fp32 keeps the baseline's arithmetic and its 16 bytes a parameter. Half-precision products with
# fp32 masters beside them are `replace(BASELINE_CAPTURED, weights_dtype="half")`, at 20 bytes a parameter.
BASELINE_CAPTURED = replace(BASELINE, name="baseline-captured", step="captured")
"""`baseline` with the captured step."""

LORA_CAPTURED = replace(
    LORA,
    name="lora-captured",
    step="captured",
    weights_dtype="half",
    training_arguments={"per_device_train_batch_size": 8},
)
"""`lora` with the captured step, its frozen weights held in half precision; what is trained stays fp32."""

QLORA_CAPTURED = replace(
    QLORA,
    name="qlora-captured",
    step="captured",
    weights_dtype="half",
    training_arguments={"per_device_train_batch_size": 8},  # one pass, nothing recomputed
)
"""`qlora` with the captured step: the same 8 sequences a step in one pass."""

METHODS = {method.name: method for method in (BASELINE, LORA, QLORA, BASELINE_CAPTURED, LORA_CAPTURED, QLORA_CAPTURED)}
"""What `--method` knows by name."""

PLANNED = (BASELINE, LORA, QLORA, LORA_CAPTURED, QLORA_CAPTURED)
"""What a plan lists, and a job takes one of, where no method is named."""


def named(text: str) -> Method:
    """The method called `text`, or the `Method` object at an import path `package.module:NAME`, or in a file,
    `path/to/file.py:NAME`. Raises ValueError, also for another method of the name of one of the suite's, which it would
    be taken for."""
    if text in METHODS:
        return METHODS[text]
    names.check_method(text)
    where, _, name = text.rpartition(":")
    try:
        module = importable.module_of(Path(where)) if where.endswith(".py") else where
        method = pkgutil.resolve_name(f"{module}:{name}")
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"method {text!r} cannot be imported: {error}") from error
    except Exception as error:  # of its author's code, whatever that is
        place = "" if isinstance(error, SyntaxError) else importable.place_of(error)
        told = f"{reason(error)} ({place})" if place else reason(error)
        raise ValueError(f"method {text!r} cannot be imported: {told}") from error
    if not isinstance(method, Method):
        raise ValueError(f"method {text!r} is a {type(method).__name__}: give a lightweight.methods.Method")
    names.refuse_namesakes("method", [METHODS.get(method.name, method), method])
    return method
