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
from transformers import PretrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightweight import corpus, models
from lightweight.forecast import skeleton, steps
from lightweight.forecast.cuda_rules import BatchKind, CudaRules
from lightweight.forecast.fake_ranks import rank_zero_of
from lightweight.forecast.recorder import Recorder, seeing_libraries
from lightweight.forecast.replay import Trace
from lightweight.internals import torch as torch_internals
from lightweight.internals.torch import FAKE_TENSOR_LOGGER, FakeTensorMode
from lightweight.methods import MethodError
from lightweight.targets import Capability, Device
from lightweight.training.meter import Meter
from lightweight.trial import Trial


class ForecastError(ValueError):
    """A model or method that cannot be built or traced. The message names the module or argument, and the reason."""


def trace_on(trial: Trial, device: Device) -> Trace:
    """The trace of a trial as it is run on `device`, with that device's kernels.

    Where the model's tokenizer is at hand, only the kinds of batches that the corpus gives are traced. Raises
    ForecastError.
    """
    try:
        trial, paddings = _longest_batches(trial)
    except Exception as error:  # a tokenizer is others' code, too
        raise ForecastError(f"{trial.name}: its rows cannot be made: {_reason(error)}") from error
    return trace(trial, device.capability or trial.target.capability, paddings)


def _longest_batches(trial: Trial) -> tuple[Trial, tuple[BatchKind, ...]]:
    """The trial with the longest batches that its corpus can make, and of which kinds these can be: such a batch has
    one of the longest rows, and as many others as the method says."""
    if not trial.model.is_loadable or not trial.corpus.train:
        return trial, ("full", "padded")
    rows = corpus.encode_all(trial.corpus.train, models.load_tokenizer(trial.model), trial.row_form).rows
    lengths = [len(row["input_ids"]) for row in rows] or [trial.max_length]
    width, in_a_pass = trial.max_length, trial.method.on_rank(trial.world_size).sequences_per_pass
    if not trial.pads_to_max:
        trial, width = replace(trial, max_length=max(lengths)), max(lengths)
        if in_a_pass == 1:
            return trial, ("full",)
    full = lengths.count(width)
    padded: tuple[BatchKind, ...] = ("padded",) if full < len(lengths) else ()
    return trial, ("full", *padded) if full >= min(in_a_pass, len(lengths)) else padded


def trace(trial: Trial, capability: Capability, paddings: tuple[BatchKind, ...] = ("full", "padded")) -> Trace:
    """Trace a trial on a GPU of this compute capability, its batches of the kinds in `paddings`. Of several ranks this
    is the trace of the first, whose shards are the largest.

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
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = Recorder(mode, Meter(torch.device("cpu"), start_seconds=0.0), rules, vocabulary)
    with _quiet(), mode, rules, recorder, seeing_libraries(recorder):
        recorder.meter.phase = "build"
        with _module_names(network) as entered:
            try:
                skeleton.materialise(network, dtype, recorder)
                parameters, trainable = (models.count_parameters(network, trainable=only) for only in (False, True))
                with torch_internals.no_hooks_left():
                    steps.train(network, trial, paddings, recorder)
            except steps.AllTracedError:
                pass
            except skeleton.UntraceableError as error:
                raise ForecastError(f"{trial.name}: {error}") from None
            except Exception as error:  # of any model's code, or a library's, which is the reason that is given
                where = f"{entered[-1]} " if entered else _optimizer_at_fault(trial, recorder)
                raise ForecastError(f"{trial.name}: {where}cannot be traced: {_reason(error)}") from error
    return Trace(
        parameters=parameters,
        trainable_parameters=trainable,
        events=recorder.events,
        causes=recorder.causes,
        phases=recorder.phases,
        streams=recorder.streams,
        paged_bytes=recorder.paged_bytes,
    )


def _optimizer_at_fault(trial: Trial, recorder: Recorder) -> str:
    """The optimizer by name, where it is being made or steps."""
    name = trial.method.training_arguments.get("optim")
    if name is None or recorder.meter.phase not in ("build", "optimizer"):
        return ""
    return f"optim={getattr(name, 'value', name)!r} "


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
def _module_names(network: nn.Module) -> Iterator[list[str]]:
    """The modules whose forward has been entered and not left, by name and class, the innermost last."""
    names = {
        id(module): f"{name or 'the network'} ({type(module).__name__})" for name, module in network.named_modules()
    }
    entered: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        entered.append(names.get(id(module), type(module).__name__))

    def leave(*_: Any) -> None:
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
