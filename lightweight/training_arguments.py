"""Which of transformers' TrainingArguments are supported, which are refused, and what is the mend for each?

A method gives TrainingArguments in their own words, and two things run its steps: HF `Trainer`, alone or on several
ranks, and the captured step. Neither does all of what TrainingArguments can ask for, and some of it is the suite's own
business: where files go, what is logged and saved, the seed, how long training lasts. `ARGUMENTS` has every one of
them. What is set and not honoured is refused before anything is built, so that no run is called what it is not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

from lightweight import preload  # isort: skip  # noqa: F401  # before transformers, whose Trainer imports peft

import torch
import transformers
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from lightweight.methods import Method, MethodError
from lightweight.models import reason
from lightweight.names import SCHEDULES

if TYPE_CHECKING:
    from lightweight.targets import Target

Values = bool | tuple[Any, ...]
"""True: all values are honoured. False: the default alone. A tuple: these and the default."""


@dataclass(frozen=True, kw_only=True)
class Argument:
    """What happens here to one of TrainingArguments.

    `trainer`, `captured` and `ranks` are the values that each honours: the Trainer, the captured step, and several
    ranks, which must train what one does. What the Trainer does not honour, nobody does. `mend` is what to do instead
    of setting it. `replaced` says that the suite sets it for every trial, so that even TrainingArguments' own default
    is not what is used.
    """

    trainer: Values = False
    captured: Values = False
    ranks: Values = False
    mend: str = "leave it out"
    replaced: bool = False

    @classmethod
    def anywhere(cls, values: Values = True, *, mend: str = "leave it out", replaced: bool = False) -> Argument:
        """One that all honour alike."""
        return cls(trainer=values, captured=values, ranks=values, mend=mend, replaced=replaced)


def _all(names: str, argument: Argument) -> dict[str, Argument]:
    return dict.fromkeys(names.split(), argument)


TORCHS_ADAMW = ("adamw_torch", "adamw_torch_fused")
"""What the captured step runs: the same arithmetic in both."""

OPTIM_NEEDS: Mapping[str, tuple[str, ...]] = {
    "bitsandbytes": ("8bit", "32bit", "bnb"),
    "torchao": ("adamw_torch_4bit", "adamw_torch_8bit"),
    "galore_torch": ("galore",),
    "apollo_torch": ("apollo",),
    "lomo_optim": ("lomo",),
    "grokadamw": ("grokadamw",),
    "schedulefree": ("schedule_free",),
    "optimi": ("stable_adamw",),
}
"""What the Trainer imports for an `optim`, by what its name has in it."""

CHECKPOINTING_KEYS = {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"}
"""What gradient_checkpointing_kwargs may say: what torch.utils.checkpoint takes, as do peft and the captured step."""

OF_TRAINING = (
    *("seed", "data_seed", "num_train_epochs", "max_steps", "train_sampling_strategy", "dataloader_drop_last"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type"),
    *("lr_scheduler_kwargs", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "bf16", "fp16", "optim", "optim_args", "label_smoothing_factor", "neftune_noise_alpha"),
)
"""Those that say what is trained, on which rows and how."""

ARGUMENTS: Mapping[str, Argument] = {
    # What is trained
    **_all(
        "per_device_train_batch_size gradient_accumulation_steps learning_rate lr_scheduler_kwargs warmup_steps "
        "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm bf16 fp16 tf32 gradient_checkpointing "
        "gradient_checkpointing_kwargs data_seed remove_unused_columns",
        Argument.anywhere(),
    ),
    "lr_scheduler_type": Argument.anywhere(SCHEDULES, mend="take another schedule: nothing is evaluated on the way"),
    # FSDP2 replaces the weights: an optimizer must work on shards as on whole weights, element by element
    "optim": Argument(trainer=True, captured=TORCHS_ADAMW, ranks=(*TORCHS_ADAMW, "sgd")),
    **_all("optim_args optim_target_modules", Argument(trainer=True)),
    "label_smoothing_factor": Argument(trainer=True, ranks=True),
    "neftune_noise_alpha": Argument(trainer=True),  # each rank would draw noise of its own
    "average_tokens_across_devices": Argument(trainer=True, captured=True),  # without it a rank weighs its own tokens
    "train_sampling_strategy": Argument(trainer=("random", "sequential", "group_by_length")),
    "full_determinism": Argument(trainer=True),
    # How the Trainer runs it
    **_all("torch_empty_cache_steps dataloader_pin_memory use_cache", Argument(trainer=True, ranks=True)),
    **_all("torch_compile torch_compile_backend torch_compile_mode", Argument(trainer=True)),
    **_all("use_liger_kernel liger_kernel_config", Argument(trainer=True)),
    **_all(
        "activation_checkpointing activation_checkpointing_kwargs",
        Argument(mend="give gradient_checkpointing, which every version knows"),
    ),
    "auto_find_batch_size": Argument(mend="set per_device_train_batch_size: `lightweight plan --max-batch` finds it"),
    "dataloader_drop_last": Argument(mend="leave it out: every pair is trained on in every epoch"),
    **_all(
        "dataloader_num_workers dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order",
        Argument(mend="leave it out: the rows lie in memory, and what other processes worked would not be counted"),
    ),
    **_all("length_column_name", Argument(mend="leave it out: rows have ids, mask and labels alone")),
    "label_names": Argument.anywhere((("labels",),), mend="leave it out: a row's labels are called `labels`"),
    "accelerator_config": Argument(mend="leave it out: which row is in which step is the suite's"),
    # The suite's own, or the command line's
    "output_dir": Argument(replaced=True, mend="leave it out: the suite gives every trial a folder; train: --output"),
    "num_train_epochs": Argument(replaced=True, mend="leave it out and give --epochs"),
    "max_steps": Argument.anywhere(
        (-1,), replaced=True, mend="leave it out and give --epochs, or `lightweight train` --max-steps"
    ),
    "seed": Argument(replaced=True, mend="leave it out and give --seed"),
    "use_cpu": Argument(replaced=True, mend="leave it out: trials use a GPU where there is one"),
    **_all(
        "parallelism_config fsdp fsdp_config deepspeed ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout local_rank",
        Argument(mend="leave it out: --gpus-per-trial, or torchrun, has several GPUs share a trial"),
    ),
    "logging_strategy": Argument.anywhere(
        ("no",), replaced=True, mend="leave it out: the loss of every step is recorded; train: --report-to"
    ),
    "disable_tqdm": Argument.anywhere((True,), replaced=True),
    **_all(
        "logging_steps logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen "
        "log_level log_level_replica skip_memory_metrics debug",
        Argument(mend="leave it out: loss, tokens, time and memory of every step are recorded"),
    ),
    "report_to": Argument.anywhere(
        ("none", ("none",), ()), mend="leave it out and give `lightweight train` --report-to"
    ),
    **_all(
        "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id",
        Argument(mend="leave it out and give `lightweight train` --report-to"),
    ),
    "save_strategy": Argument.anywhere(
        ("no",), replaced=True, mend="leave it out and give `lightweight train` --save-steps"
    ),
    **_all(
        "save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint",
        Argument(mend="leave it out and give `lightweight train` --save-steps"),
    ),
    **_all(
        "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint",
        Argument(mend="leave it out and give `lightweight train` --resume"),
    ),
    **_all(
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
        Argument(mend="leave it out: nothing is sent anywhere, upload the saved folder yourself"),
    ),
    "do_train": Argument.anywhere((True,)),
    **_all(
        "do_eval do_predict eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only "
        "eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics "
        "batch_eval_metrics bf16_full_eval fp16_full_eval load_best_model_at_end metric_for_best_model "
        "greater_is_better",
        Argument(mend="leave it out: what is held out is evaluated before and after training"),
    ),
}
"""Every one of TrainingArguments, of all versions of transformers that are supported."""


def check(method: Method, target: Target, world_size: int) -> None:
    """Raise MethodError, in one line, for a TrainingArgument of `method` that would not mean what it says when
    `world_size` ranks train it for `target`, and for an adapter that would not."""
    if method.left_out is not None:
        raise MethodError(f"method {method.name}: {method.left_out}")
    if method.moves_ranks and world_size > 1:
        raise MethodError(
            f"method {method.name}: AdaLoRA would choose different ranks on each GPU: train it on one GPU"
        )
    defaults = _defaults()
    for name, value in method.training_arguments.items():
        if name not in defaults:
            raise MethodError(f"method {method.name}: {_unknown(name, defaults)}")
        argument = ARGUMENTS.get(name)
        if argument is None:
            raise MethodError(
                f"method {method.name}: {name} is new in transformers {transformers.__version__}, and lightweight does "
                "not know it yet: leave it out"
            )
        if not argument.replaced and _plain(value) == _plain(defaults[name]):
            continue
        _check_value(method, name, value)
        refusal = _refusal(argument, value, captured=method.captured_step is not None, world_size=world_size)
        if refusal is not None:
            raise MethodError(f"method {method.name}: {name}={_brief(value)} {refusal}")
    _check_beside_own_code(method)
    _check_step(method, defaults)
    if method.training_arguments.get("tf32") and not target.bf16:
        raise MethodError(
            f"method {method.name}: it asks for tf32, which target {target.name} does not have: leave it out"
        )


def default(name: str) -> Any:
    """What TrainingArguments have as `name` where nothing is said."""
    return _plain(_defaults()[name])


def _refusal(argument: Argument, value: Any, *, captured: bool, world_size: int) -> str | None:
    """Why `value` is not honoured, and the mend; None where it is."""
    if not _honours(argument.trainer, value):
        whose = "the suite's own" if argument.replaced else "not honoured here"
        return f"is {whose}: {argument.mend}"
    if captured and not _honours(argument.captured, value):
        return f"is not supported by the captured step: {argument.mend}, or let the Trainer run the steps"
    if world_size > 1 and not _honours(argument.ranks, value):
        return f"would have several ranks train differently from one: {argument.mend}, or train on one GPU"
    return None


def _honours(values: Values, value: Any) -> bool:
    return values if isinstance(values, bool) else _plain(value) in [_plain(known) for known in values]


def _check_value(method: Method, name: str, value: Any) -> None:
    """Raise MethodError for a value that TrainingArguments would refuse much later, or others would not understand."""
    kinds: dict[str, type[Enum]] = {"lr_scheduler_type": SchedulerType, "optim": OptimizerNames}
    if name in kinds and _plain(value) not in [kind.value for kind in kinds[name]]:
        known = _nearest(str(value), (str(kind.value) for kind in kinds[name]))
        raise MethodError(f"method {method.name}: transformers knows no {name} {value!r}{known}: take one of its own")
    if name == "gradient_checkpointing_kwargs" and (others := sorted(set(value or ()) - CHECKPOINTING_KEYS)):
        raise MethodError(
            f"method {method.name}: {name} with {others[0]!r} is not honoured here, only with torch.utils.checkpoint's "
            f"{', '.join(sorted(CHECKPOINTING_KEYS))}: leave it out"
        )


BESIDE_OWN_CODE: Mapping[str, tuple[str, ...]] = {
    "optimizer": ("optim", "optim_args", "optim_target_modules"),
    "compute_loss": ("label_smoothing_factor",),
}
"""What the Trainer passes over where a method has code of its author's in its place."""


def _check_beside_own_code(method: Method) -> None:
    for field, names_beside in BESIDE_OWN_CODE.items():
        for name in names_beside:
            if field in method.own_code and name in method.training_arguments:
                value = _brief(method.training_arguments[name])
                raise MethodError(
                    f"method {method.name}: {name}={value} would be ignored, since its {field} replaces it: "
                    "leave out one of them"
                )


OF_OPTIMIZER = ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
OF_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "learning_rate")
LONG = 10**6
"""Optimizer steps of a job in which every schedule that can be had has room."""


def _check_step(method: Method, defaults: Mapping[str, Any]) -> None:
    """Raise MethodError for what AdamW or the schedule would refuse once the network is built, and for a step of no
    sequences."""
    said = {**defaults, **method.training_arguments}
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if type(said[name]) is not int or said[name] < 1:
            raise MethodError(f"method {method.name}: {name}={_brief(said[name])}: give a whole number from 1 on")
    if not isinstance(said["learning_rate"], float | int):
        raise MethodError(f"method {method.name}: learning_rate={_brief(said['learning_rate'])}: give a number")
    with _refused(method, OF_OPTIMIZER):
        stand_in = torch.optim.AdamW(
            [torch.nn.Parameter(torch.zeros(()))],
            lr=said["learning_rate"],
            betas=(said["adam_beta1"], said["adam_beta2"]),
            eps=said["adam_epsilon"],
            weight_decay=said["weight_decay"],
        )
    settings = said["lr_scheduler_kwargs"]
    with _refused(method, OF_SCHEDULE):
        get_scheduler(
            said["lr_scheduler_type"],
            stand_in,
            num_warmup_steps=0,
            num_training_steps=LONG,
            scheduler_specific_kwargs=json.loads(settings) if isinstance(settings, str) else dict(settings or {}),
        )


def check_schedule(method: Method, arguments: TrainingArguments, steps: int) -> None:
    """Raise MethodError where the schedule has no rate for a step of a job of so many: transformers' polynomial one
    divides by the steps after the warmup."""
    warmup = arguments.get_warmup_steps(steps)
    stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=arguments.learning_rate)
    try:
        schedule: Any = get_scheduler(
            arguments.lr_scheduler_type,
            stand_in,
            num_warmup_steps=warmup,
            num_training_steps=steps,
            scheduler_specific_kwargs=cast("dict[str, Any]", arguments.lr_scheduler_kwargs or {}),
        )
        for rate_of in getattr(schedule, "lr_lambdas", ()):
            for step in (0, warmup, steps):
                rate_of(step)
    except ZeroDivisionError as error:
        name = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
        raise MethodError(
            f"method {method.name}: its schedule {name} has no rate for a job of {steps} steps, {warmup} of them warmup"
            ": take fewer --warmup steps, or more steps"
        ) from error


@contextlib.contextmanager
def _refused(method: Method, names: Iterable[str]) -> Iterator[None]:
    """Raise MethodError for what is refused inside, with those of the arguments `names` that the method gives."""
    try:
        yield
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        given = [f"{name}={_brief(value)}" for name, value in method.training_arguments.items() if name in names]
        raise MethodError(f"method {method.name}: {', '.join(given)} is refused ({reason(error)})") from error


def _defaults() -> dict[str, Any]:
    """The default of every TrainingArgument of the installed transformers."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(TrainingArguments)
        if field.init
    }


def _unknown(name: str, defaults: Iterable[str]) -> str:
    nearest = _nearest(name, defaults)
    return f"transformers {transformers.__version__} has no TrainingArgument {name!r}{nearest}: correct or remove it"


def _nearest(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def _plain(value: Any) -> Any:
    """`value` as it compares with others that mean the same: members of enums by value, sequences as tuples."""
    match value:
        case Enum():
            return value.value
        case list() | tuple():
            return tuple(_plain(item) for item in value)
    return value


def _brief(value: Any) -> str:
    said = " ".join(repr(_plain(value)).split())
    return said if len(said) <= 60 else f"{said[:60]}..."
