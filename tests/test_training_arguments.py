import dataclasses
import re

import peft
import pytest
from transformers import SchedulerType, TrainingArguments

from lightweight import targets, training_arguments
from lightweight.__main__ import main
from lightweight.forecast import plan
from lightweight.forecast.tracer import ForecastError
from lightweight.methods import METHODS, Method, MethodError
from lightweight.models import OPT_TINY
from lightweight.session import options
from lightweight.trial import Trial

FIELDS = [field.name for field in dataclasses.fields(TrainingArguments)]
HOW = [("trainer", 1), ("trainer", 2), ("captured", 1), ("captured", 2)]
"""What runs a method's steps, and on how many ranks."""


def method(step="trainer", **settings):
    return Method(name="mine", step=step, training_arguments=settings)


def refused(made, world_size=1, target=targets.NATIVE):
    """The line that refuses `made`."""
    with pytest.raises(MethodError) as raised:
        training_arguments.check(made, target, world_size)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("method mine: ")
    return str(raised.value)


@pytest.mark.parametrize("name", FIELDS)
def test_every_training_argument_has_its_place_in_the_table(name):
    assert name in training_arguments.ARGUMENTS


def test_an_argument_that_the_table_does_not_have_is_refused_where_it_is_set(monkeypatch):
    """As one would be that a new version of transformers brings."""
    rest = {name: argument for name, argument in training_arguments.ARGUMENTS.items() if name != "weight_decay"}
    monkeypatch.setattr(training_arguments, "ARGUMENTS", rest)
    training_arguments.check(method(learning_rate=1.0), targets.NATIVE, 1)
    assert "weight_decay is new in transformers" in refused(method(weight_decay=0.1))


def test_adalora_is_trained_on_one_rank():
    adalora = Method(name="mine", adapter=peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=9))
    training_arguments.check(adalora, targets.NATIVE, 1)
    assert "train it on one GPU" in refused(adalora, world_size=2)


@pytest.mark.parametrize(("step", "world_size"), HOW)
def test_what_is_said_as_it_is_anyway_is_no_reason_to_refuse(step, world_size):
    for name, value in training_arguments._defaults().items():
        if not training_arguments.ARGUMENTS[name].replaced:
            training_arguments.check(method(step, **{name: value}), targets.NATIVE, world_size)
    own = {
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": ["none"],
        "disable_tqdm": True,
        "max_steps": -1,
    }
    own |= {"do_train": True, "label_names": ["labels"], "lr_scheduler_type": SchedulerType.LINEAR}
    training_arguments.check(method(step, **own), targets.NATIVE, world_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_suites_own_methods_are_honoured(world_size):
    for own in METHODS.values():
        training_arguments.check(own, targets.T4, world_size)


HONOURED = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "adam_beta2": 0.9,
    "max_grad_norm": 0.0,
    "optim": "adamw_torch",
    "bf16": True,
    "tf32": True,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "data_seed": 3,
    "remove_unused_columns": False,
}


@pytest.mark.parametrize(("step", "world_size"), HOW)
def test_what_is_honoured_everywhere_is_refused_nowhere(step, world_size):
    training_arguments.check(method(step, **HONOURED), targets.NATIVE, world_size)


@pytest.mark.parametrize(
    ("name", "value", "on_ranks"),
    [
        ("label_smoothing_factor", 0.3, True),
        ("neftune_noise_alpha", 5.0, False),
        ("train_sampling_strategy", "group_by_length", False),
        ("train_sampling_strategy", "sequential", False),
        ("optim", "sgd", True),
        ("optim", "adamw_8bit", False),
        ("optim_args", "a=1", False),
        ("torch_compile", True, False),
        ("use_liger_kernel", True, False),
        ("full_determinism", True, False),
    ],
)
def test_what_the_trainer_alone_does_is_refused_of_the_captured_step(name, value, on_ranks):
    training_arguments.check(method(**{name: value}), targets.NATIVE, 1)
    line = refused(method("captured", **{name: value}))
    assert (
        f"{name}={value!r} is not supported by the captured step: leave it out, or let the Trainer run the steps"
        in line
    )
    if on_ranks:
        training_arguments.check(method(**{name: value}), targets.NATIVE, 2)
    else:
        assert "would have several ranks train differently from one" in refused(method(**{name: value}), 2)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_steps", 3, "is the suite's own: leave it out and give --epochs, or `lightweight train` --max-steps"),
        ("num_train_epochs", 1, "is the suite's own: leave it out and give --epochs"),
        ("num_train_epochs", 3.0, "is the suite's own"),  # the default of TrainingArguments, which is not the suite's
        ("seed", 42, "is the suite's own: leave it out and give --seed"),
        ("output_dir", "mine", "is the suite's own: leave it out: the suite gives every trial a folder"),
        ("save_strategy", "epoch", "give `lightweight train` --save-steps"),
        ("save_steps", 20, "give `lightweight train` --save-steps"),
        ("report_to", "wandb", "give `lightweight train` --report-to"),
        ("dataloader_drop_last", True, "every pair is trained on in every epoch"),
        ("dataloader_num_workers", 2, "is not honoured here"),
        ("auto_find_batch_size", True, "set per_device_train_batch_size"),
        ("lr_scheduler_type", "reduce_lr_on_plateau", "take another schedule"),
        ("load_best_model_at_end", True, "is evaluated before and after training"),
        ("train_sampling_strategy", "batch_rebalance", "is not honoured here"),
        ("deepspeed", "ds.json", "--gpus-per-trial"),
        ("fsdp", "full_shard", "--gpus-per-trial"),
        ("label_names", ["start"], "called `labels`"),
        ("push_to_hub", True, "upload the saved folder yourself"),
        ("learning_rat", 1.0, r"(did you mean 'learning_rate'?)"),
        ("lr_scheduler_type", "warmup_stable_decay", "lr_scheduler_type='warmup_stable_decay' is refused (get_wsd_"),
        ("lr_scheduler_kwargs", {"num_cycle": 2}, "is refused"),
        ("learning_rate", -1.0, "learning_rate=-1.0 is refused (Invalid learning rate: -1.0)"),
        ("learning_rate", "fast", "give a number"),
        ("adam_beta1", 1.5, "adam_beta1=1.5 is refused"),
        ("weight_decay", -0.1, "weight_decay=-0.1 is refused"),
        ("per_device_train_batch_size", 0, "give a whole number from 1 on"),
        ("gradient_accumulation_steps", 1.5, "give a whole number from 1 on"),
        ("optim", "adamwtorch", r"(did you mean 'adamw_torch'?)"),
        ("gradient_checkpointing_kwargs", {"every_n_layers": 2}, "only with torch.utils.checkpoint's"),
    ],
)
@pytest.mark.parametrize("step", ["trainer", "captured"])
def test_what_nothing_here_does_is_refused_whoever_runs_the_steps(step, name, value, expected):
    line = refused(method(step, **{name: value}))
    assert name in line
    assert expected in line


@pytest.mark.parametrize("command", [["train"], ["plan"], None])
def test_a_mend_offers_options_that_there_are(command, capsys):
    """Words beside a command's name are of that command; the others are said in the suite."""
    known = {f"--{option.name}" for option in options.OPTIONS}
    if command is not None:
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    offered = set()
    for argument in training_arguments.ARGUMENTS.values():
        of = {name: re.findall(rf"(?:`lightweight {name}[`]? |{name}: )(--[a-z-]+)", argument.mend) for name in OF}
        named = [option for words in of.values() for option in words]
        offered |= set(of[command[0]] if command else set(re.findall(r"--[a-z-]+", argument.mend)) - set(named))
    assert offered
    assert offered <= known


OF = ("train", "plan")


@pytest.mark.parametrize("kind", sorted(training_arguments.SCHEDULES))
def test_every_schedule_that_is_honoured_can_be_had(kind):
    needs = {
        "warmup_stable_decay": {"num_decay_steps": 2},
        "cosine_with_min_lr": {"min_lr": 1e-5},
        "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    }
    training_arguments.check(method(lr_scheduler_type=kind, lr_scheduler_kwargs=needs.get(kind)), targets.NATIVE, 1)


def test_tf32_on_a_target_without_it_is_refused():
    assert "it asks for tf32, which target t4 does not have" in refused(method(tf32=True), target=targets.T4)


def test_ranks_that_would_weigh_their_own_tokens_are_refused_and_one_is_not():
    training_arguments.check(method(average_tokens_across_devices=False), targets.NATIVE, 1)
    assert "would have several ranks" in refused(method(average_tokens_across_devices=False), 2)


def test_a_trial_and_a_plan_refuse_before_anything_is_built(micro, small_corpus):
    made = method(max_steps=3)
    with pytest.raises(MethodError, match="max_steps=3 is the suite's own"):
        Trial(model=micro, method=made, target=targets.CPU, corpus=small_corpus)
    with pytest.raises(ForecastError, match="max_steps=3 is the suite's own"):
        plan.plan([OPT_TINY], [made], [targets.T4])
