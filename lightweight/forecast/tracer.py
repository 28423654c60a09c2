"""Will this fit, before anyone has a GPU or the weights? The peak of a training step, forecast from a trace of it.

The network is built without weights, its adapter put on, and HF `Trainer` itself trains it for a few optimizer steps on
fake tensors, which have shapes and no content. Every allocation and release of the trace is then replayed through a
model of torch's caching allocator, with or without a budget: what is at the peak, in which phase, and whether it fits.
"""

from __future__ import annotations

import functools
import gc
import logging
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args
from unittest import mock

from lightweight import preload  # isort: skip  # noqa: F401  # before Trainer, which imports peft

import torch
from bitsandbytes import functional as bitsandbytes_functional
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from bitsandbytes.optim.optimizer import GlobalOptimManager, Optimizer8bit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PretrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightweight import corpus, models
from lightweight.forecast.allocator import CachingAllocator, OutOfBudgetError
from lightweight.forecast.cuda_rules import BatchKind, CudaRules
from lightweight.forecast.fake_ranks import rank_zero_of
from lightweight.methods import MethodError
from lightweight.targets import CONTEXT_BYTES, HOPPER, Capability, Device
from lightweight.training import stock
from lightweight.training.meter import Meter
from lightweight.training.stock import Request
from lightweight.trial import Phase, Trial

Cause = Literal[
    "weights", "quantization state", "gradients", "optimizer", "activations", "logits", "gathered", "workspace"
]
"""What memory is held for. `gathered` is what ranks gather from each other and reduce among them, a layer at a time:
its whole weights, and the buffers of both ways."""

CAUSES: tuple[Cause, ...] = get_args(Cause)


class ForecastError(ValueError):
    """A model or method that cannot be built or traced. The message names the module or argument, and the reason."""


Verdict = Literal["fits", "does_not_fit", "too_close_to_call"]

MARGIN = 0.03
"""How far from a budget a forecast must be to decide: the committed matrix (experiments/records/h200-forecast.json)
is forecast within 1.2 % allocated and 1.8 % reserved, and what decides lies between the two."""

PAGED_ELEMENTS = 100_000
"""From so many elements on, bitsandbytes' paged optimizers keep a parameter's state in managed memory:
bitsandbytes/optim/optimizer.py, get_state_buffer (0.50)."""

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What a replay found. `by_cause` adds up to `allocated_bytes`; `phase` is where that peak was.

    `out_of_memory_in` is the phase in which the budget did not suffice; the rest then describes the time until that.
    """

    allocated_bytes: int
    reserved_bytes: int
    phase: Phase
    by_cause: dict[Cause, int]
    out_of_memory_in: Phase | None = None


@dataclass(kw_only=True)
class Trace:
    """Every allocation and release of building a network and training it for a few optimizer steps.

    `events` are (name, bytes) in order: a name allocated with its bytes, or released with 0. `causes` says by name what
    each was for, `phases` where in `events` each phase began, `streams` in which stream it was allocated, where that is
    another than the first, 0. `paged_bytes` are of no event: optimizer state in managed memory, which the driver moves
    between card and host.
    """

    parameters: int
    trainable_parameters: int
    events: list[tuple[int, int]] = field(default_factory=list)
    causes: dict[int, Cause] = field(default_factory=dict)
    phases: list[tuple[int, Phase]] = field(default_factory=list)
    streams: dict[int, int] = field(default_factory=dict)
    paged_bytes: int = 0

    def replay(self, budget_bytes: float | None = None) -> Peak:
        """The peak of training, on a card whose allocator may reserve `budget_bytes`."""
        allocator = CachingAllocator(budget_bytes)
        sizes: dict[int, int] = {}
        held, at_peak = dict.fromkeys(CAUSES, 0), dict.fromkeys(CAUSES, 0)
        begins = dict(self.phases)
        phase: Phase = "build"
        peak_phase, stopped_in, peak_bytes = phase, None, 0
        for index, (name, size) in enumerate(self.events):
            if index in begins:
                if phase == "build":
                    allocator.empty_cache()
                    allocator.reset_peaks()
                    peak_bytes = 0
                phase = begins[index]
            if size == 0:
                allocator.release(name)
                held[self.causes[name]] -= sizes.pop(name)
                continue
            before = allocator.allocated_bytes
            try:
                allocator.allocate(name, size, self.streams.get(name, 0))
            except OutOfBudgetError:
                stopped_in = phase
                break
            sizes[name] = allocator.allocated_bytes - before
            held[self.causes[name]] += sizes[name]
            if allocator.allocated_bytes > peak_bytes:
                peak_bytes, peak_phase, at_peak = allocator.allocated_bytes, phase, dict(held)
        return Peak(
            allocated_bytes=allocator.peak_allocated_bytes,
            reserved_bytes=allocator.peak_reserved_bytes,
            phase=peak_phase,
            by_cause=at_peak,
            out_of_memory_in=stopped_in,
        )


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What training takes, and whether a budget allows it.

    `allocated_bytes` is the peak of `torch.cuda.max_memory_allocated`, and `by_cause` what it consists of.
    `reserved_bytes` is that of `max_memory_reserved`: under the budget where it fits, without one where it does not.
    `phase` is where it runs out of memory, or else where the peak is. `paged_bytes` is what a paged optimizer keeps
    beside that in managed memory, on the card as far as there is room and else on the host; no verdict counts it.
    """

    allocated_bytes: int
    reserved_bytes: int
    phase: Phase
    by_cause: dict[Cause, int]
    verdict: Verdict
    budget_bytes: int | None
    parameters: int
    trainable_parameters: int
    paged_bytes: int = 0


def within(traced: Trace, budget_bytes: int | None) -> Forecast:
    """The forecast of a trace on a card whose allocator may reserve `budget_bytes`; `None` is no limit."""
    free = capped = traced.replay()
    verdict: Verdict = "fits"
    if budget_bytes is not None:
        capped = traced.replay(budget_bytes)
        if traced.replay(budget_bytes * (1 - MARGIN)).out_of_memory_in is not None:
            decided = traced.replay(budget_bytes * (1 + MARGIN)).out_of_memory_in is not None
            verdict = "does_not_fit" if decided else "too_close_to_call"
    return Forecast(
        allocated_bytes=free.allocated_bytes,
        reserved_bytes=(free if capped.out_of_memory_in else capped).reserved_bytes,
        phase=capped.out_of_memory_in or free.phase,
        by_cause=free.by_cause,
        verdict=verdict,
        budget_bytes=budget_bytes,
        parameters=traced.parameters,
        trainable_parameters=traced.trainable_parameters,
        paged_bytes=traced.paged_bytes,
    )


def of_trial(traced: Trace, trial: Trial, device: Device) -> Forecast:
    """The forecast of a trial on `device`, under the budget of its target or else that of the device itself."""
    budget_bytes = trial.target.budget_bytes
    if budget_bytes is None and device.total_bytes is not None:
        budget_bytes = device.total_bytes - CONTEXT_BYTES
    return within(traced, budget_bytes)


def trace_on(trial: Trial, device: Device) -> Trace:
    """The trace of a trial as it is run on `device`, with that device's kernels.

    Where the model's tokenizer is at hand, only the kinds of batches that the corpus gives are traced. Raises
    ForecastError.
    """
    try:
        paddings = _paddings(trial)
    except Exception as error:  # a tokenizer is others' code, too
        raise ForecastError(f"{trial.name}: its rows cannot be made: {_reason(error)}") from error
    return trace(trial, device.capability or trial.target.capability, paddings)


def _paddings(trial: Trial) -> tuple[BatchKind, ...]:
    if not trial.model.is_loadable or not trial.corpus.train:
        return "full", "padded"
    tokenizer = models.load_tokenizer(trial.model)
    rows = [corpus.encode(pair, tokenizer, trial.max_length) for pair in trial.corpus.train]
    full = sum(all(row["attention_mask"]) for row in rows)
    padded: tuple[BatchKind, ...] = ("padded",) if full < len(rows) else ()
    return ("full", *padded) if full >= min(trial.method.sequences_per_pass, len(rows)) else padded


def trace(trial: Trial, capability: Capability = HOPPER, paddings: tuple[BatchKind, ...] = ("full", "padded")) -> Trace:
    """Trace a trial on a GPU of this compute capability, its batches of the kinds in `paddings`.

    The peak comes once the optimizer has its state and, where a step has several forward passes, once there are
    gradients to add to. So each kind of batch is traced after a first optimizer step; or, where passes accumulate, in
    one step that begins with state and gradients, which is quicker. Of several ranks this is the trace of the first,
    whose shards are the largest.

    Needs the model's configuration, and no weights. Raises ForecastError, and ModelError where there is no
    configuration.
    """
    config = models.configuration(trial.model)
    if (reason := refusal(trial, config)) is not None:
        raise ForecastError(f"{trial.name}: {reason}")
    trial = replace(trial, method=replace(trial.method, quantization=_settled(trial, config)))
    method = trial.method.on_rank(trial.world_size)
    dtype = getattr(torch, method.weights_dtype)
    try:
        with _quiet():
            network = method.adapt(models.skeleton(config, dtype, method.quantization))
    except Exception as error:  # of transformers, peft or the quantizer: what they say of one method is its own line
        raise ForecastError(f"{trial.name}: cannot be built: {_reason(error)}") from error
    with rank_zero_of(trial.world_size), _garbage_of_its_own():
        return _trace(trial, capability, paddings, network, config.get_text_config().vocab_size)


def refusal(trial: Trial, config: PretrainedConfig) -> str | None:
    """Why a trial of a model with `config` cannot be forecast, as far as that is known before it is traced."""
    if trial.method.captured_step is not None:
        return "the captured step is not forecast, only steps that the Trainer runs"
    if trial.method.library != "peft":
        return f"{trial.method.library} is not forecast, only transformers and peft"
    longest = models.longest_row(config)
    if longest is not None and longest < trial.max_length:
        return f"rows of {trial.max_length} tokens, where the model takes {longest}"
    try:
        _settled(trial, config)
    except (models.ModelError, MethodError) as error:
        return str(error)
    return None


def _settled(trial: Trial, config: PretrainedConfig) -> QuantizationConfigMixin | None:
    """What the trial's weights are quantized by: as their checkpoint has them, else as the method says."""
    return models.settle_quantization(trial.model, config, trial.method, sharded=trial.is_sharded)


def _trace(
    trial: Trial, capability: Capability, paddings: tuple[BatchKind, ...], network: Any, vocabulary: int
) -> Trace:
    dtype = getattr(torch, trial.method.weights_dtype)
    rules = CudaRules(capability)
    mode: Any = FakeTensorMode(allow_non_fake_inputs=True)
    tracer = _Tracer(mode, Meter(torch.device("cpu"), start_seconds=0.0), rules, vocabulary)
    with _quiet(), mode, rules, tracer, _sharding_seen_by(tracer), _bitsandbytes_seen_by(tracer):
        tracer.meter.phase = "build"
        with _module_names(network) as entered:
            try:
                _materialise(network, dtype, tracer, trial)
                parameters, trainable = (models.count_parameters(network, trainable=only) for only in (False, True))
                _train(network, trial, paddings, tracer)
            except _TracedError:
                pass
            except ForecastError:
                raise
            except Exception as error:  # of any model's code, or a library's: they are the reason that is told
                where = f"{entered[-1]} " if entered else _optimizer_at_fault(trial, tracer)
                raise ForecastError(f"{trial.name}: {where}cannot be traced: {_reason(error)}") from error
    return Trace(
        parameters=parameters,
        trainable_parameters=trainable,
        events=tracer.events,
        causes=tracer.causes,
        phases=tracer.phases,
        streams=tracer.streams,
        paged_bytes=tracer.paged_bytes,
    )


def _optimizer_at_fault(trial: Trial, tracer: _Tracer) -> str:
    """The optimizer by name, where it is being made or steps."""
    name = trial.method.training_arguments.get("optim")
    if name is None or tracer.meter.phase not in ("build", "optimizer"):
        return ""
    return f"optim={getattr(name, 'value', name)!r} "


class _Tracer(TorchDispatchMode):
    """Writes down what operators allocate, and when it is released: when the last tensor of a storage goes, or the
    storage is resized to nothing."""

    def __init__(self, mode: Any, meter: Meter, rules: CudaRules, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode
        self._results: dict[Any, tuple[Any, Any, torch.dtype]] = {}
        self.meter = meter
        self.rules = rules
        self.paused = False
        self.events: list[tuple[int, int]] = []
        self.causes: dict[int, Cause] = {}
        self.phases: list[tuple[int, Phase]] = []
        self.streams: dict[int, int] = {}
        self.paged_bytes = 0
        self._vocabulary = vocabulary
        self._stream_numbers = {torch.cpu.current_stream(): 0}
        self._names: dict[int, int | None] = {}
        self._workspaces: set[tuple[str, bool]] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled, and torch's guard against that would cost a tenth of the time."""
        return False

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if operator is torch.ops.prim.device.default:  # asked for more often than all else together
            return arguments[0].fake_device
        if operator is torch.ops.aten.rand.default and not arguments[0]:
            # A single number decides whether a layer is dropped: the most memory is held when none is.
            with no_dispatch():
                one = torch.ones(())
            return self._mode.fake_tensor_converter.from_real_tensor(self._mode, one, make_constant=True)
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # and see what it does with the rank's own part
        if self.paused:
            return operator(*arguments, **options or {})
        self._enter_phase()
        if operator.namespace == "fsdp":  # what its operators write to is what is sent and received
            for written in tree_iter(arguments[1] if operator.name() == "fsdp::all_gather_copy_in" else options):
                if isinstance(written, Tensor):
                    self.mark(written, "gathered")
        # Each thread that multiplies matrices has workspaces of its own, and backward runs in another thread.
        for kind, size in self.rules.workspace_bytes(operator).items():
            if (workspace := (kind, self.meter.phase == "backward")) not in self._workspaces:
                self._workspaces.add(workspace)
                self._allocate(size, "workspace")
        scratch_bytes = self.rules.scratch_bytes(operator, arguments)
        scratch = self._allocate(scratch_bytes, "workspace") if scratch_bytes else None
        result = self._run(operator, arguments, options or {})
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value)
        if scratch is not None:
            self.events.append((scratch, 0))
        return result

    def _run(self, operator: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The operator's result. Shapes that were computed once are remembered: layers are alike, and asking fake
        tensors again takes most of a forecast's time."""
        is_view = operator.is_view or operator is torch.ops.aten._unsafe_view.default  # a view that says it is none
        if is_view and type(arguments[0]) is FakeTensor:
            with no_dispatch(), in_kernel_invocation_manager(self._mode):
                view = operator(*arguments, **options)
            if type(view) is Tensor:
                return FakeTensor(self._mode, view, _CPU)
        if not _is_pure(operator):
            return operator(*arguments, **options)
        key = operator, _shapes(arguments), _shapes(tuple(options.items()))
        shape = self._results.get(key)
        if shape is None:
            result = operator(*arguments, **options)
            if type(result) is FakeTensor and result.dim() > 0:  # a scalar may carry its value
                self._results[key] = result.shape, result.stride(), result.dtype
            return result
        with no_dispatch():
            size, stride, dtype = shape
            return FakeTensor(self._mode, torch.empty_strided(size, stride, dtype=dtype, device="meta"), _CPU)

    def mark(self, tensor: Tensor, cause: Cause) -> None:
        """Say what a tensor is for; of a sharded one, the rank's own part."""
        tensor = getattr(tensor, "_local_tensor", tensor)
        self._see(tensor)
        if (name := self._names.get(tensor.untyped_storage()._cdata)) is not None:
            self.causes[name] = cause

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Write nothing down of what is allocated inside, until a tensor of it is marked."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def page(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in managed memory, which the caching allocator knows nothing of."""
        with self.unseen():
            paged = torch.zeros(size, dtype=dtype)
        storage = paged.untyped_storage()
        self._names[storage._cdata] = None
        weakref.finalize(storage, self._forget, storage._cdata)
        self.paged_bytes += storage.nbytes()
        return paged

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Note that a storage has changed its size. FSDP2 so frees the whole weights of a layer, and gets them back."""
        self._enter_phase()
        key = storage._cdata
        if key in self._names:
            self._release(key)
        else:
            weakref.finalize(storage, self._forget, key)
        self._names[key] = self._allocate(storage.nbytes(), "gathered") if storage.nbytes() else None

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._names or size == 0:
            return
        if self._stream():
            cause: Cause = "gathered"
        elif self.meter.phase == "build":
            cause = "weights"
        elif tensor.dim() > 1 and tensor.size(-1) == self._vocabulary:
            cause = "logits"
        else:
            cause = "activations"
        self._names[key] = self._allocate(size, cause)
        weakref.finalize(storage, self._forget, key)

    def _allocate(self, size: int, cause: Cause) -> int:
        name = len(self.causes)
        self.causes[name] = cause
        self.events.append((name, size))
        if stream := self._stream():
            self.streams[name] = stream
        return name

    def _stream(self) -> int:
        """Where memory is allocated now. FSDP2 gathers and reduces in streams of its own, each with a pool of the
        caching allocator's; torch gives the CPU such streams in name."""
        return self._stream_numbers.setdefault(torch.cpu.current_stream(), len(self._stream_numbers))

    def _release(self, key: int) -> None:
        if (name := self._names[key]) is not None:
            self.events.append((name, 0))

    def _forget(self, key: int) -> None:
        self._release(key)
        del self._names[key]

    def _enter_phase(self) -> None:
        if not self.phases or self.phases[-1][1] != self.meter.phase:
            self.phases.append((len(self.events), self.meter.phase))


@contextmanager
def _sharding_seen_by(tracer: _Tracer) -> Iterator[None]:
    """Show the tracer what no operator does, the resizing of storages, and nothing of the whole tensors on which
    DTensor tries every operator for the shape of its result."""
    resize: Any = torch.UntypedStorage.resize_
    propagate: Any = ShardingPropagator._propagate_tensor_meta_non_cached

    def resize_and_tell(storage: torch.UntypedStorage, size: int) -> None:
        resize(storage, size)
        tracer.resized(storage)

    def propagate_unseen(*arguments: Any) -> Any:
        with tracer.unseen():
            return propagate(*arguments)

    with (
        mock.patch.object(torch.UntypedStorage, "resize_", resize_and_tell),
        mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate_unseen),
    ):
        yield


@contextmanager
def _bitsandbytes_seen_by(tracer: _Tracer) -> Iterator[None]:
    """Have bitsandbytes' optimizers and quantizers do with fake tensors what they do on a GPU, and leave nothing of it
    in what they keep for the whole process."""

    def paged_as_on_a_gpu(optimizer: Any, parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if optimizer.is_paged and parameter.numel() >= PAGED_ELEMENTS:
            return tracer.page(tuple(parameter.shape), dtype)
        return torch.zeros_like(parameter, dtype=dtype)

    def in_managed_memory(*shape: int, dtype: torch.dtype = torch.float32, **_: Any) -> Tensor:
        return tracer.page(shape, dtype)  # which AdEMAMix asks for itself, for the two moments in one tensor

    def numbers_of_8_bits(*_: Any, **__: Any) -> Tensor:  # which bitsandbytes computes one by one, by their values
        with tracer.unseen():  # on the host, until they are in use
            return torch.empty(256)

    with (
        mock.patch.object(Optimizer8bit, "get_state_buffer", paged_as_on_a_gpu),
        mock.patch.object(bitsandbytes_functional, "get_paged", in_managed_memory),
        mock.patch.object(bitsandbytes_functional, "fill", return_value=None),
        mock.patch.object(bitsandbytes_functional, "create_dynamic_map", numbers_of_8_bits),
        mock.patch.dict(bitsandbytes_functional.name2qmap, clear=True),
        mock.patch.object(GlobalOptimManager, "_instance", None),
    ):
        yield


@functools.cache
def _is_pure(operator: Any) -> bool:
    """Whether an operator's result is new memory, and its shape follows from its arguments' shapes."""
    schema = operator._schema
    return not (
        schema.is_mutable
        or any(value.alias_info is not None for value in schema.returns)
        or operator is torch.ops.aten._unsafe_view.default  # a view that says it is none
        or torch.Tag.dynamic_output_shape in operator.tags
        or torch.Tag.data_dependent_output in operator.tags
    )


def _shapes(value: Any) -> Any:
    """What an operator's result depends on, in a form that can be looked up."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, tuple | list):
        return tuple(_shapes(item) for item in value)
    return type(value), value


def _materialise(network: Any, dtype: torch.dtype, tracer: _Tracer, trial: Trial) -> None:
    """Turn a network on the meta device into one of fake tensors, piece by piece, quantized as it comes."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:  # tied weights stay tied
            new: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = new
        return made[id(tensor)]

    for name, module in network.named_modules():
        if isinstance(module, Linear8bitLt):
            raise ForecastError(
                f"{trial.name}: {name} is quantized to 8 bits, which cannot be traced: use 4 bits, or none"
            )
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is None:
                    continue
                if isinstance(module, Linear4bit) and key == "weight":
                    tensors[key] = _quantize(tensor, dtype, tracer)
                    module.quant_state = tensors[key].quant_state
                    # sharding loses it, and the layer would make a Params4bit of its weight to say it again
                    module.register_forward_pre_hook(
                        lambda layer, _: setattr(layer.weight, "quant_state", layer.quant_state)
                    )
                    module.support_avx512bf16_for_cpu = False  # a CPU would repack them, a GPU does not
                else:
                    tensors[key] = fake(tensor)
    network.to = lambda *_, **__: network  # it is where it is to be; moving would swap tensors, which fake ones cannot


def _quantize(weight: Any, dtype: torch.dtype, tracer: _Tracer) -> nn.Parameter:
    """What bitsandbytes' own quantization makes of a 4-bit layer's weight. Its Params4bit cannot hold a fake tensor, so
    a plain parameter carries what its layers and peft read."""
    packed, state = bitsandbytes_functional.quantize_4bit(
        torch.empty(weight.shape, dtype=dtype),
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
    )
    quantized: Any = nn.Parameter(packed, requires_grad=False)
    for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage"):
        setattr(quantized, name, getattr(weight, name))
    quantized.bnb_quantized, quantized.quant_state = True, state
    for parts in (vars(state), vars(state.state2) if state.nested else {}, bitsandbytes_functional.name2qmap):
        for tensor in parts.values():
            if isinstance(tensor, Tensor):
                tracer.mark(tensor, "quantization state")
    return quantized  # type: ignore[no-any-return]


def _train(network: Any, trial: Trial, paddings: tuple[BatchKind, ...], tracer: _Tracer) -> None:
    """Let the Trainer train `network` on batches of the kinds in `paddings`. Raises _TracedError when done."""
    method = trial.method.on_rank(trial.world_size)
    arguments = method.training_arguments
    accumulates = arguments.get("gradient_accumulation_steps", 1) > 1
    # The kinds of batches that the forward passes of each step see.
    if accumulates and trial.world_size == 1:
        steps = [list(paddings)]
    elif accumulates:  # a step begins without gradients; the first pass makes them, the last one reduces them
        steps = [[paddings[-1], *paddings]]
    else:
        steps = [[kind] for kind in (paddings[0], *paddings)]
    trial = replace(trial, max_steps=len(steps), device_index=None)
    owner = _TracedRounds(len(steps), tracer, begin_in_the_middle=accumulates)
    overrides = {
        "gradient_accumulation_steps": len(steps[0]),
        "logging_nan_inf_filter": False,  # it reads the loss, and a fake one has no value
    }
    folder = Path(tempfile.gettempdir())  # which is there, as the Trainer will have it, and gets nothing
    trainer: Any = stock.make_trainer(trial, network, [{"labels": []}], tracer.meter, owner, folder, **overrides)
    owner.trainer = trainer
    if arguments.get("fp16"):
        # accelerate takes fp16 autocast and its scaler on a GPU only; Accelerator.__init__
        trainer.accelerator.native_amp, trainer.accelerator.scaler = True, torch.amp.GradScaler("cpu")
    kinds = iter([kind for step in steps for kind in step])
    network.register_forward_pre_hook(lambda *_: setattr(tracer.rules, "padding", next(kinds)))
    shape = (method.sequences_per_pass, trial.max_length)
    batch = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
    trainer.get_train_dataloader = lambda: [dict(batch) for step in steps for _ in step]
    with _whole_gradients_marked_by(tracer) if trial.world_size > 1 else nullcontext():
        trainer.train()


@contextmanager
def _whole_gradients_marked_by(tracer: _Tracer) -> Iterator[None]:
    """Have the gradients of every parameter marked that a module computes with: under FSDP2 the network's own are
    shards, and the whole ones are made in the first forward pass."""
    known: set[int] = set()

    def see(module: nn.Module, *_: Any) -> None:
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad and id(parameter) not in known:
                known.add(id(parameter))
                parameter.register_post_accumulate_grad_hook(lambda grown: tracer.mark(grown.grad, "gradients"))

    hook = register_module_forward_hook(see)
    try:
        yield
    finally:
        hook.remove()


class _TracedError(Exception):
    """Every step there is to trace has been traced."""


class _TracedRounds:
    """The owner of the traced training, which ends it after the last step."""

    def __init__(self, steps: int, tracer: _Tracer, begin_in_the_middle: bool) -> None:
        self._steps, self._tracer, self._begin_in_the_middle = steps, tracer, begin_in_the_middle
        self.trainer: Any = None

    def training_began(self) -> None:
        for parameter in self.trainer.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda grown: self._tracer.mark(grown.grad, "gradients"))
        if self._begin_in_the_middle:
            optimizer = self.trainer.optimizer.optimizer
            self._tracer.meter.phase = "optimizer"
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
                    self._tracer.mark(parameter.grad, "gradients")
            optimizer.step()
            self._mark_state()
            if self.trainer.is_fsdp_enabled:  # what passes add to are whole gradients, which no step begins with
                optimizer.zero_grad()

    def await_request(self, request: Request) -> None: ...

    def step_ended(self) -> None:
        self._mark_state()
        self._steps -= 1
        if self._steps == 0:
            raise _TracedError

    def round_ended(self) -> None: ...

    def _mark_state(self) -> None:
        for state in self.trainer.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    self._tracer.mark(value, "optimizer")


@contextmanager
def _garbage_of_its_own() -> Iterator[None]:
    """The Trainer looks for garbage when it starts, and Python as objects become many. Looking through all that was
    imported would take half the time of a small model's trace."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries say meanwhile: torch logs a traceback for what becomes one line here, transformers warns
    of its own names and has advice on checkpointing where FSDP shards."""
    loggers = [logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "transformers.training_args")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # transformers tells tied embeddings by their addresses, to say how many elements 8-bit optimizers skip
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _module_names(network: nn.Module) -> Iterator[list[str]]:
    """The modules whose forward has been entered and not left, by name and class, the innermost last."""
    names = {
        id(module): f"{name or 'the network'} ({type(module).__name__})" for name, module in network.named_modules()
    }
    entered: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        entered.append(names.get(id(module), type(module).__name__))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        entered.pop()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()


def _reason(error: Exception) -> str:
    """The first line of what went wrong; an error of ours has said all of it in one."""
    lines = str(error).strip().splitlines()
    if isinstance(error, MethodError | models.ModelError) and lines:
        return lines[0]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
