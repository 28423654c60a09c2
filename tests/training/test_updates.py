"""An update at the schedule's rates in each step of the Trainer, or a note that says otherwise."""

from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from lightweight.methods import Method

pytestmark = pytest.mark.usefixtures("without_gpu")

ANOTHER_RATE = "its learning rate was another than its schedule's in"


class Faster(TrainerCallback):
    def on_step_begin(self, args, state, control, optimizer=None, **_):
        assert optimizer is not None
        if state.global_step == 2:
            optimizer.param_groups[0]["lr"] = 0.01


def test_a_rate_that_a_callback_sets_is_told(trained):
    own = trained(Method(name="faster", callbacks=(Faster,)))
    assert own.data_note == "its learning rate was another than its schedule's in 1 of its 6 steps"


class Quiet(TrainerCallback):
    """Does nothing."""


@pytest.mark.parametrize(
    "schedule",
    [
        ("cosine_with_min_lr", {"min_lr": 1e-5}),
        ("cosine_warmup_with_min_lr", {"min_lr": 1e-5}),
        ("polynomial", {"lr_end": 1e-5}),
    ],
    ids=lambda schedule: schedule[0],
)
def test_a_schedule_that_ends_at_a_rate_of_its_own_is_no_other(trained, schedule):
    arguments = {"lr_scheduler_type": schedule[0], "lr_scheduler_kwargs": schedule[1], "learning_rate": 1e-4}
    assert trained(Method(name=schedule[0], training_arguments=arguments, callbacks=(Quiet,))).data_note is None


class Base(TrainerCallback):
    """Changes what the schedule begins at, and so what it says of itself."""

    def on_train_begin(self, args, state, control, lr_scheduler=None, **_):
        assert lr_scheduler is not None
        lr_scheduler.base_lrs = [10 * rate for rate in lr_scheduler.base_lrs]


def always(step):
    return 1.0


class Shape(TrainerCallback):
    def on_train_begin(self, args, state, control, lr_scheduler=None, **_):
        assert lr_scheduler is not None
        lr_scheduler.lr_lambdas = [always for _ in lr_scheduler.lr_lambdas]


class Constant(Trainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        of: Any = optimizer or self.optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(of, always)
        return self.lr_scheduler


@pytest.mark.parametrize("own", [{"callbacks": (Base,)}, {"callbacks": (Shape,)}, {"trainer": Constant}])
def test_a_schedule_that_is_another_than_the_methods_is_told(trained, own):
    arguments = {"lr_scheduler_type": "cosine"}
    name = "-".join(map(str, own.values()))
    note = trained(Method(name=name, training_arguments=arguments, **own)).data_note
    assert note == f"{ANOTHER_RATE} 5 of its 6 steps"  # the first is at the rate that is said


class AtItsOwnRate(torch.optim.AdamW):
    def step(self, closure=None):
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = 0.01
        super().step()
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate


class Sets(torch.optim.AdamW):
    def step(self, closure=None):
        super().step()
        self.param_groups[0]["lr"] = 0.01


class Thrice(torch.optim.AdamW):
    def step(self, closure=None):
        for _ in range(3):
            super().step()


class Plain(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step()


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        (AtItsOwnRate, f"{ANOTHER_RATE} 6 of its 6 steps"),
        (Sets, f"{ANOTHER_RATE} 6 of its 6 steps"),
        (Thrice, "its optimizer took 18 steps in 6 of the Trainer's"),
        (Plain, None),
        (torch.optim.SGD, None),
        (torch.optim.AdamW, None),
    ],
)
def test_what_an_optimizer_does_inside_its_step_is_told(trained, kind, note):
    assert trained(Method(name=kind.__name__, optimizer=(kind, {}))).data_note == note


class AgainOnTheSame(torch.optim.AdamW):
    """Trains on the batch again, inside its step."""

    def __init__(self, network, rate):
        super().__init__(network.parameters(), lr=rate)
        self.network = [network]
        self.batch: dict[str, torch.Tensor] = {}
        network.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, network, arguments, options):
        if torch.is_grad_enabled():
            self.batch = {name: options[name] for name in ("input_ids", "attention_mask", "labels")}

    def step(self, closure=None):
        super().step()
        self.zero_grad()
        self.network[0](**self.batch).loss.backward()
        super().step()


def again(network, arguments):
    return AgainOnTheSame(network, arguments.learning_rate)


def test_an_optimizer_that_trains_once_more_is_told(trained):
    note = "its optimizer took 12 steps in 6 of the Trainer's; 40 rows reached it more often than once a pass over the "
    assert trained(Method(name="again", optimizer=again)).data_note == note + "corpus"


class Forgets(Trainer):
    """Throws the gradient of every other step away."""

    def training_step(self, model, *arguments, **options):
        loss = super().training_step(model, *arguments, **options)
        if self.state.global_step % 2:
            model.zero_grad()
        return loss


def test_gradients_that_are_thrown_away_are_told(trained):
    assert trained(Method(name="forgets", trainer=Forgets)).data_note == "no weight had a gradient in 3 of its 6 steps"
