from dataclasses import replace

import pytest
import torch

from lightweight import targets
from lightweight.methods import BASELINE, LORA, Method, MethodError
from lightweight.training.heldout import heldout_loss
from lightweight.trial import Trial
from training.test_stock import prepare

pytestmark = pytest.mark.usefixtures("without_gpu")


@pytest.fixture
def trainer_of(micro, small_corpus, folder):
    """The Trainer of a method, and the meter."""

    def make(method):
        trial = Trial(model=micro, method=method, target=targets.CPU, corpus=small_corpus, epochs=1)
        trainer, rows, meter, _ = prepare(trial, folder)
        return trainer, rows, meter

    return make


def as_the_trainers(network, arguments):
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    return torch.optim.AdamW(weights, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)


def at_its_own_rate(network, arguments):
    return torch.optim.SGD(network.parameters(), lr=0.1)


def without_biases(network, arguments):
    weights = [weight for name, weight in network.named_parameters() if not name.endswith("bias")]
    return torch.optim.SGD(weights, lr=arguments.learning_rate)


def a_scheduler(network, arguments):
    return torch.optim.lr_scheduler.ConstantLR(at_its_own_rate(network, arguments))


def test_an_optimizer_like_the_trainers_trains_the_same(trainer_of):
    losses = []
    for method in (BASELINE, Method(name="own", optimizer=as_the_trainers)):
        trainer, _, meter = trainer_of(method)
        trainer.train()
        losses.append(meter.measurements().train_loss)
    assert losses[0] == losses[1]


def test_a_class_with_its_keywords_takes_the_learning_rate_and_the_trainers_groups(trainer_of):
    arguments = {"learning_rate": 0.02, "weight_decay": 0.1}
    method = Method(name="sgd", optimizer=(torch.optim.SGD, {"momentum": 0.9}), training_arguments=arguments)
    made = trainer_of(method)[0].create_optimizer()
    assert type(made) is torch.optim.SGD
    assert [(group["lr"], group["momentum"], group["weight_decay"]) for group in made.param_groups] == [
        (0.02, 0.9, 0.1),
        (0.02, 0.9, 0.0),
    ]


def with_a_closure(network, arguments):
    return torch.optim.LBFGS(network.parameters(), lr=arguments.learning_rate)


@pytest.mark.parametrize(
    ("optimizer", "arguments", "expected"),
    [
        (
            at_its_own_rate,
            {"learning_rate": 1e-3},
            "learning_rate=0.001 is not used by its optimizer .*:at_its_own_rate",
        ),
        (as_the_trainers, {"adam_beta2": 0.95}, "adam_beta2=0.95 is not used by its optimizer .*:as_the_trainers"),
        ((torch.optim.SGD, {"lr": 0.1}), {"learning_rate": 1e-3}, "learning_rate=0.001 is not used by its optimizer"),
        (without_biases, {}, "leaves out .* trained weights, such as model.decoder.final_layer_norm.bias"),
        (with_a_closure, {}, "its step needs a closure"),
        (a_scheduler, {}, "a_scheduler returns a ConstantLR: return a torch.optim.Optimizer"),
    ],
)
def test_an_optimizer_that_trains_otherwise_than_is_said_is_refused(trainer_of, optimizer, arguments, expected):
    with pytest.raises(MethodError, match=f"method own: .*{expected}") as raised:
        trainer_of(Method(name="own", optimizer=optimizer, training_arguments=arguments))
    assert "\n" not in str(raised.value)


def test_a_rate_of_its_own_is_nothing_to_refuse_where_nobody_says_another(trainer_of):
    assert trainer_of(Method(name="own", optimizer=at_its_own_rate))[0].create_optimizer().param_groups[0]["lr"] == 0.1


class WithoutSchedule(torch.optim.SGD):
    """Trains with other weights than it is to be evaluated with, as schedule-free optimizers do."""

    evaluates = False

    def train(self):
        self.move(False)

    def eval(self):
        self.move(True)

    def move(self, evaluates):
        if self.evaluates != evaluates:
            self.evaluates = evaluates
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.data += 1 if evaluates else -1


def without_schedule(network, arguments):
    return WithoutSchedule(network.parameters(), lr=arguments.learning_rate)


def test_held_out_losses_are_of_the_weights_that_an_optimizer_evaluates(trainer_of):
    trainer, rows, _ = trainer_of(replace(BASELINE, name="free", optimizer=without_schedule))
    trainer.train()
    weight = next(trainer.model.parameters())
    before = weight.detach().clone()
    loss = heldout_loss(trainer, rows[:4])
    assert torch.allclose(weight, before + 1)
    assert heldout_loss(trainer, rows[:4]) == loss


def test_an_adapters_optimizer_has_the_adapters_weights(trainer_of):
    trainer, *_ = trainer_of(replace(LORA, name="own", training_arguments={}, optimizer=as_the_trainers))
    held = {id(w) for group in trainer.create_optimizer().param_groups for w in group["params"]}
    assert held == {id(weight) for weight in trainer.model.parameters() if weight.requires_grad}
