"""Will this fit, before anyone has a GPU or the weights? The peak of a training step, forecast from a trace of it.

The network is built without weights, its adapter put on, and HF `Trainer` itself trains it for a few optimizer steps on
fake tensors, which have shapes and no content. Every allocation and release of the trace is then replayed through a
model of torch's caching allocator, with or without a budget: what is at the peak, in which phase, and whether it fits.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from lightweight import preload  # isort: skip  # noqa: F401  # before Trainer, which imports peft

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightweight import corpus, methods, models
from lightweight.captured.loop import compiles
from lightweight.corpus import Rows
from lightweight.forecast import captured, skeleton, steps
from lightweight.forecast.cuda_rules import BatchKind, CudaRules
from lightweight.forecast.fake_ranks import rank_zero_of
from lightweight.forecast.recorder import Recorder, seeing_libraries
from lightweight.forecast.replay import Trace
from lightweight.forecast.work import Work, added
from lightweight.importable import import_path
from lightweight.internals import torch as torch_internals
from lightweight.internals.torch import FAKE_TENSOR_LOGGER, FakeTensorMode
from lightweight.methods import MethodError
from lightweight.targets import Capability, Device, has_bf16
from lightweight.training.meter import Meter
from lightweight.trial import Trial

WAITS_FOR_OUTLIERS = (
    "each product with 8-bit weights asks the device whether an input has outliers, which no graph can do, so that the "
    "Trainer would run the steps: take a method without the captured step"
)

COMPILING = "torch_compile", "torch_compile_backend", "torch_compile_mode"
"""TrainingArguments each of which has the Trainer compile the network."""


class ForecastError(ValueError):
    """A model or method that cannot be built or traced. The message names the module or argument, and the reason."""


def trace_on(trial: Trial, device: Device) -> Trace:
    """The trace of a trial as it is run on `device`, with that device's kernels.

    Where the model's tokenizer is at hand, it is of the rows that the corpus gives. Raises ForecastError.
    """
    try:
        trial, rows = _with_rows(trial)
    except Exception as error:  # a tokenizer is others' code, too
        raise ForecastError(f"{trial.name}: its rows cannot be made: {_reason(error)}") from error
    return trace(trial, device.capability or trial.target.capability, rows)


def _with_rows(trial: Trial) -> tuple[Trial, Rows | None]:
    """The trial, and its training rows; None where the corpus or the tokenizer is not at hand."""
    if not trial.corpus.train:
        return trial, None
    if trial.model.is_loadable:
        tokenizer = models.load_tokenizer(trial.model)
    elif trial.model.weights == "random" and trial.method.captured_step is not None:
        tokenizer = models.drawn_tokenizer(trial.model)
    else:
        return trial, None
    each = corpus.encode_all(trial.corpus.train, tokenizer, trial.row_form).rows
    if not each:  # all were too long, which is for the child to say
        return trial, None
    return trial.with_rows(len(each)), Rows(each, 0, trial.max_length if trial.pads_to_max else None)


def _longest_batches(trial: Trial, rows: Rows | None) -> tuple[Trial, tuple[BatchKind, ...]]:
    """The trial with the longest batches that `rows` can make, and of which kinds these can be: such a batch has one of
    the longest rows, and as many others as the method says and there are."""
    if rows is None:
        return trial, ("full", "padded")
    in_a_pass = trial.method.on_rank(trial.world_size).sequences_per_pass
    if trial.world_size == 1 and len(rows) < in_a_pass:  # several ranks are dealt rows of nothing for those that lack
        in_a_pass = len(rows)
        trial = replace(trial, method=trial.method.with_batch(in_a_pass))
    if not trial.pads_to_max:
        trial = replace(trial, max_length=rows.width)
        if in_a_pass == 1:
            return trial, ("full",)
    full = sum(len(row["input_ids"]) == rows.width for row in rows)
    padded: tuple[BatchKind, ...] = ("padded",) if full < len(rows) else ()
    return trial, ("full", *padded) if full >= min(in_a_pass, len(rows)) else padded


def trace(trial: Trial, capability: Capability, rows: Rows | None = None) -> Trace:
    """Trace a trial over `rows` on a GPU of this compute capability; without rows, over such as take most. Of several
    ranks this is the trace of the first, whose shards are the largest.

    Needs the model's configuration, and no weights. Raises ForecastError, and ModelError where there is no
    configuration.
    """
    config = models.configuration(trial.model)
    if (reason := refusal(trial, config, capability, rows)) is not None:
        raise ForecastError(f"{trial.name}: {reason}")
    trial = replace(trial, method=replace(trial.method, quantization=_settled(trial, config, capability)))
    step = trial.method.captured_step
    if step is not None:
        bf16 = trial.target.bf16 and has_bf16(capability)
        trial = replace(trial, device_index=0, method=trial.method.on_gpu(bf16=bf16))
    method = (trial.method.to_be_sharded() if trial.is_sharded else trial.method).on_rank(trial.world_size)
    dtype = getattr(torch, method.weights_dtype)
    try:
        with _quiet():
            network = models.skeleton(config, dtype, method.quantization)
            network = methods.adapt(method, network, upcast=step is None or step.upcast)
    except Exception as error:  # of transformers, peft or the quantizer: what they say of one method is its own line
        raise ForecastError(f"{trial.name}: cannot be built: {_reason(error)}") from error
    with rank_zero_of(trial.world_size), _garbage_of_its_own():
        return _trace(trial, capability, rows, network, config.get_text_config().vocab_size)


def refusal(trial: Trial, config: PretrainedConfig, capability: Capability, rows: Rows | None = None) -> str | None:
    """Why a trial of a model with `config` over `rows`, where these are known, cannot be forecast on a card of this
    `capability`, as far as that is known before it is traced."""
    step = trial.method.captured_step
    if step is not None and compiles(step, trial.steps if trial.corpus.train else 0):
        return "what torch.compile makes of the captured step is not forecast: take compile=False"
    if any(trial.method.training_arguments.get(name) for name in COMPILING):
        return "what torch.compile makes of the network is not forecast: take torch_compile=False"
    if trial.method.library != "peft":
        return f"{trial.method.library} is not forecast, only transformers and peft"
    longest = models.longest_row(config)
    width = trial.max_length if rows is None else rows.width
    if longest is not None and longest < width:
        return f"rows of {width} tokens, where the model takes {longest}"
    try:
        quantization = _settled(trial, config, capability)
        models.check_forecastable(trial.model, quantization)
        if step is not None and step.graph and _looks_for_outliers(quantization):
            return WAITS_FOR_OUTLIERS
        methods.check_layers(trial.method, trial.model)
    except (models.ModelError, MethodError) as error:
        return str(error).removeprefix(f"{trial.name}: ")
    return None


def _looks_for_outliers(quantization: QuantizationConfigMixin | None) -> bool:
    if not isinstance(quantization, BitsAndBytesConfig):
        return False
    return bool(quantization.load_in_8bit and quantization.llm_int8_threshold > 0)


def _settled(trial: Trial, config: PretrainedConfig, capability: Capability) -> QuantizationConfigMixin | None:
    """What the trial's weights are quantized by: as their checkpoint has them, else as the method says."""
    return methods.settle_quantization(
        trial.model, config, trial.method, sharded=trial.is_sharded, capability=capability
    )


def _trace(trial: Trial, capability: Capability, rows: Rows | None, network: Any, vocabulary: int) -> Trace:
    dtype = getattr(torch, trial.method.weights_dtype)
    step = trial.method.captured_step
    rules = CudaRules(capability, cudnn=step is None or step.attention == "model")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    meter = Meter(torch.device("cpu"), start_seconds=0.0)
    recorder = Recorder(mode, meter, rules, vocabulary, is_sharded=trial.is_sharded)
    with _quiet(), mode, rules, recorder, seeing_libraries(recorder), torch_internals.gradients_clipped_at_once():
        recorder.meter.phase = "build"
        with _modules_told_to(recorder.entered, network):
            try:
                skeleton.materialise(network, dtype, recorder, in_one_block=step is None or not step.offload)
                flop_per_token = models.flop_per_token(network, trial.max_length)
                parameters, trainable = (models.count_parameters(network, trainable=only) for only in (False, True))
                with torch_internals.no_hooks_left():
                    if step is None:
                        steps.train(network, *_longest_batches(trial, rows), recorder)
                    else:
                        recorder.answers = lambda: not recorder.entered  # what a module asks for, no graph can have
                        captured.train(network, trial, rows, recorder)
            except steps.AllTracedError:
                pass
            except captured.UncapturedError as error:
                raise ForecastError(f"{trial.name}: cannot be captured: {error}") from None
            except Exception as error:  # of any model's code, or a library's, which is the reason that is given
                where = f"{recorder.entered[-1]} " if recorder.entered else _part_at_fault(trial, recorder)
                raise ForecastError(f"{trial.name}: {where}cannot be traced: {_reason(error)}") from error
    return Trace(
        parameters=parameters,
        trainable_parameters=trainable,
        events=recorder.events,
        causes=recorder.causes,
        phases=recorder.phases,
        streams=recorder.streams,
        kept=frozenset(recorder.kept),
        emptied=recorder.emptied,
        training_from=recorder.training_from,
        paged_bytes=recorder.paged_bytes,
        host_bytes=recorder.host_bytes,
        work=_work(trial, recorder),
        flop_per_token=flop_per_token,
    )


def _work(trial: Trial, recorder: Recorder) -> Work:
    """What an optimizer step has the device do: a captured one was seen whole, of the Trainer's one pass and the
    optimizer."""
    passes = 1 if trial.method.captured_step else trial.method.on_rank(trial.world_size).passes_per_step
    return added((recorder.of_pass.work(), passes), (recorder.of_optimizer.work(), 1))


def _part_at_fault(trial: Trial, recorder: Recorder) -> str:
    """What of the method is at fault, by name, where no module is: its optimizer, where that is being made or steps;
    else the code that its author brings along."""
    method = trial.method
    name = method.training_arguments.get("optim")
    if recorder.meter.phase in ("build", "optimizer"):
        if method.optimizer is not None:
            of = method.optimizer[0] if isinstance(method.optimizer, tuple) else method.optimizer
            return f"optimizer {import_path(of)} "
        if name is not None:
            return f"optim={getattr(name, 'value', name)!r} "
    own = ", ".join(method.own_code)
    return f"its own {own} " if own else ""


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
    loggers = [logging.getLogger(name) for name in (FAKE_TENSOR_LOGGER, "transformers.training_args")]
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
def _modules_told_to(entered: list[str], network: nn.Module) -> Iterator[None]:
    """Inside, `entered` has the modules whose forward pass has been entered and not left, by name and class, the
    innermost last; without those that a backward pass computes again, which checkpointing leaves in their middle."""
    names = {
        id(module): f"{name or 'the network'} ({type(module).__name__})" for name, module in network.named_modules()
    }

    def enter(module: nn.Module, _: Any) -> None:
        if not torch_internals.in_backward():
            entered.append(names.get(id(module), type(module).__name__))

    def leave(*_: Any) -> None:
        if not torch_internals.in_backward():
            entered.pop()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _reason(error: Exception) -> str:
    """The first line of what went wrong; an error of ours has said all of it in one."""
    says = models.first_line(error)
    return says if isinstance(error, MethodError | models.ModelError) else f"{type(error).__name__}: {says}"
