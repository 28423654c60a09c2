"""What code of a method's own makes of the data is told, and changes nothing of what is compared."""

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot
from transformers import Trainer, TrainerCallback

from lightweight import targets
from lightweight.child import worker
from lightweight.child.owner import Child
from lightweight.corpus import IGNORED
from lightweight.methods import BASELINE, Method, MethodError
from lightweight.training.meter import DivergedError, Meter
from lightweight.trial import Crashed, Trial
from training.test_stock import CPU, Unattended

pytestmark = pytest.mark.usefixtures("without_gpu")


def mean_of_answers(outputs, labels, num_items_in_batch, scale=1.0):
    losses = cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")
    return scale * losses / num_items_in_batch


def test_a_loss_of_ones_own_that_is_the_networks_trains_the_same(trained):
    own = trained(Method(name="same", compute_loss=mean_of_answers))
    assert own.train_loss == pytest.approx(trained().train_loss, abs=1e-5)
    assert own.heldout_loss_after == pytest.approx(trained().heldout_loss_after, abs=1e-5)
    assert (own.data_note, own.step_tokens) == (None, trained().step_tokens)


def test_a_loss_on_another_scale_changes_no_held_out_nats(trained):
    own = trained(Method(name="thousandth", compute_loss=partial(mean_of_answers, scale=1e-3)))
    assert own.train_loss[0] == pytest.approx(trained().train_loss[0] / 1000, rel=1e-3)
    assert own.heldout_loss_before == pytest.approx(trained().heldout_loss_before, abs=1e-6)
    assert own.heldout_loss_after == pytest.approx(trained().heldout_loss_after, abs=0.02)  # Adam knows no scale
    nothing = trained(Method(name="nothing", compute_loss=partial(mean_of_answers, scale=0.0)))
    assert nothing.train_loss == (0.0,) * 6
    assert nothing.heldout_loss_after == pytest.approx(nothing.heldout_loss_before, abs=1e-6)


class Half:
    """Trains on every other row of a batch, and says that it had all."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, rows):
        batch = self.collate(rows)
        return {name: value[::2] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


class Beginnings:
    """Leaves the last token of every row out."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, rows):
        return self.collate([{name: value[:-1] for name, value in row.items()} for row in rows])


def easy(collate):
    """Says that every token is the first of the vocabulary."""

    def call(rows):
        batch = collate(rows)
        return batch | {"labels": torch.where(batch["labels"] == IGNORED, IGNORED, 0)}

    return call


def test_rows_that_a_collator_leaves_out_are_told_and_counted(trained):
    own = trained(Method(name="half", data_collator=Half))
    assert own.data_note == "20 of 40 rows did not reach it"
    assert 0.4 < sum(own.step_tokens) / sum(trained().step_tokens) < 0.6
    assert 2 * sum(own.step_padded_tokens) == sum(trained().step_padded_tokens)


def test_rows_that_a_collator_changes_are_told(trained):
    own = trained(Method(name="beginnings", data_collator=Beginnings))
    strange = "40 rows reached the network that are none of the corpus's as they stand there"
    assert own.data_note == f"{strange}; 40 of 40 rows did not reach it"


def unlabelled(collate):
    def call(rows):
        batch = collate(rows)
        return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}

    return call


def test_a_step_that_a_collator_leaves_without_labels_is_told(trained):
    with pytest.raises(DivergedError, match="training loss is nan at step 1: none of its tokens has a label"):
        trained(Method(name="unlabelled", data_collator=unlabelled))


def test_labels_that_a_collator_changes_are_told(trained):
    own = trained(Method(name="easy", data_collator=easy))
    assert own.data_note == "the loss was on other labels than the corpus's in 6 of 6 steps"
    assert own.heldout_loss_before == pytest.approx(trained().heldout_loss_before, abs=1e-6)


def left(collate):
    """Pads on the left, which changes no row."""

    def call(rows):
        batch = collate(rows)
        lengths = batch["attention_mask"].sum(1).tolist()
        turned: dict[str, list[torch.Tensor]] = {name: [] for name in ("input_ids", "attention_mask", "labels")}
        for name, rows_of_batch in turned.items():
            rows_of_batch += [row.roll(-length) for row, length in zip(batch[name], lengths, strict=True)]
        return {name: torch.stack(rows_of_batch) for name, rows_of_batch in turned.items()}

    return call


def test_the_side_that_is_padded_makes_no_other_rows(trained):
    own = trained(Method(name="left", data_collator=left))
    assert (own.data_note, own.step_tokens) == (None, trained().step_tokens)


@pytest.mark.parametrize("collator", [Half, Beginnings, easy])
def test_held_out_losses_are_of_the_suites_own_rows(trained, collator):
    own = trained(Method(name=f"heldout-{collator.__name__}", data_collator=collator))
    assert own.heldout_loss_before == pytest.approx(trained().heldout_loss_before, abs=1e-6)


class Answering(Trainer):
    """Leaves every other label out of what the network is given."""

    def compute_loss(self, model, inputs, *arguments, **options):
        labels = inputs["labels"].clone()
        labels[:, ::2] = IGNORED
        return super().compute_loss(model, inputs | {"labels": labels}, *arguments, **options)


def test_labels_that_a_trainer_changes_on_the_way_to_the_network_are_told(trained):
    own = trained(Method(name="answering", trainer=Answering))
    assert own.data_note == "the loss was on other labels than the corpus's in 6 of 6 steps"


class Estimates(Trainer):
    """Estimates a gradient by two losses, as MeZO does."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        with torch.no_grad():
            losses = [self.compute_loss(model, dict(inputs)) for _ in range(2)]
        return losses[0]


def test_passes_without_gradients_train_where_no_other_does(trained):
    own = trained(Method(name="estimates", trainer=Estimates))
    assert own.data_note == "40 rows reached it more often than once a pass over the corpus"
    assert own.step_tokens == trained().step_tokens


class Looks(TrainerCallback):
    """Asks the network, in the middle of training it."""

    def on_step_end(self, args, state, control, model=None, **_):
        ids = torch.ones(1, 5, dtype=torch.int64)
        with torch.no_grad():
            model(input_ids=ids)
            model.get_decoder()(input_ids=ids)
            model.generate(ids, max_new_tokens=2)


class TrainsInside(TrainerCallback):
    """Trains the decoder alone on what is none of the corpus's."""

    def on_step_end(self, args, state, control, model=None, **_):
        model.get_decoder()(input_ids=torch.ones(1, 5, dtype=torch.int64))[0].sum().backward()
        model.zero_grad()


def test_what_computes_no_gradients_trains_nothing(trained):
    assert trained(Method(name="looks", callbacks=(Looks,))).data_note is None


def test_training_a_part_of_the_network_is_told(trained):
    strange = "6 rows reached the network that are none of the corpus's as they stand there"
    assert trained(Method(name="inside", callbacks=(TrainsInside,))).data_note == strange


class Seeded(Trainer):
    def __init__(self, **options):
        options["args"].seed = 7
        super().__init__(**options)


def test_a_seed_that_a_trainer_sets_is_told(trained):
    own = trained(Method(name="seeded", trainer=Seeded))
    assert own.data_note == "its code changed seed from 0 to 7; the rows came in another order from step 1 on"


@pytest.mark.parametrize("step", ["trainer", "captured"])
@pytest.mark.parametrize(("name", "value"), [("data_seed", 7), ("train_sampling_strategy", "sequential")])
def test_another_order_that_the_method_asks_for_is_told(trained, name, value, step):
    if name != "data_seed" and step == "captured":
        return  # which is refused
    own = trained(Method(name=f"{name}-{step}", training_arguments={name: value}, step=step))
    assert own.data_note == f"the rows came in another order: {name}={value}"
    if step == "trainer":
        own = trained(Method(name=f"own-{name}", training_arguments={name: value}, callbacks=(TrainerCallback,)))
        assert own.data_note == "the rows came in another order from step 1 on"
    assert trained(Method(name="same-seed", training_arguments={"data_seed": 0})).data_note is None


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 4


def test_a_training_that_ends_early_is_told(trained):
    own = trained(Method(name="stops", callbacks=(Stops,)))
    assert (own.data_note, len(own.train_loss)) == ("it ended after 4 of 6 optimizer steps", 4)


class Sequential(Trainer):
    def _get_train_sampler(self, *_):
        rows: Any = self.train_dataset
        return torch.utils.data.SequentialSampler(rows)


class Sharpness(Trainer):
    """Two gradients a pass, as sharpness-aware minimization takes."""

    def training_step(self, model, inputs, *arguments, **options):
        super().training_step(model, dict(inputs), *arguments, **options)
        model.zero_grad()
        return super().training_step(model, inputs, *arguments, **options)


class Elsewhere(Trainer):
    def get_train_dataloader(self):
        assert isinstance(self.train_dataset, list)
        self.train_dataset = self.train_dataset[:8]
        return super().get_train_dataloader()


def test_another_order_is_told(trained):
    own = trained(Method(name="sequential", trainer=Sequential))
    assert own.data_note == "the rows came in another order from step 1 on"
    assert sum(own.step_tokens) == sum(trained().step_tokens)


def test_what_is_computed_twice_is_counted_once_and_told(trained):
    own = trained(Method(name="sharpness", trainer=Sharpness))
    assert own.data_note == "40 rows reached it more often than once a pass over the corpus"
    assert own.step_tokens == trained().step_tokens
    assert sum(own.step_padded_tokens) == 2 * sum(trained().step_padded_tokens)


def test_other_rows_than_the_others_are_told(trained):
    own = trained(Method(name="elsewhere", trainer=Elsewhere))
    assert "it ended after 2 of 6 optimizer steps" in own.data_note
    assert "rows reached it more often" in own.data_note


def test_a_trainer_that_changes_nothing_trains_the_same(trained):
    own = trained(Method(name="plain", trainer=Plain))
    assert own.train_loss == trained().train_loss
    assert (own.heldout_loss_after, own.data_note) == (trained().heldout_loss_after, None)
    assert own.step_tokens == trained().step_tokens


class Plain(Trainer):
    def compute_loss_context_manager(self):
        return super().compute_loss_context_manager()


class InHalves(Trainer):
    def compute_loss_context_manager(self):
        return torch.autocast("cpu", torch.bfloat16)


def test_held_out_losses_are_in_the_precision_that_the_method_says(trained):
    own = trained(Method(name="halves", trainer=InHalves))
    assert own.heldout_loss_before == trained().heldout_loss_before
    assert own.train_loss[0] != trained().train_loss[0]


class Peeks(torch.nn.Module):
    """Adds to its logits the tokens that they are to predict."""

    def __init__(self, network):
        super().__init__()
        self.network, self.config = network, network.config

    def forward(self, input_ids, **options):
        outputs = self.network(input_ids=input_ids, **options)
        return outputs | {"logits": outputs.logits + 5 * one_hot(input_ids.roll(-1, 1), outputs.logits.shape[-1])}

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.network, name)


def test_a_network_that_sees_what_it_predicts_is_refused(trained):
    with pytest.raises(MethodError, match="method peeks: its network sees the tokens that it must predict"):
        trained(Method(name="peeks", transform=Peeks))


def in_blocks(network, size):
    """Lets a token attend to all of its block and what came before."""

    def attend(module, arguments, options):
        hidden = options["hidden_states"] if "hidden_states" in options else arguments[0]
        block = torch.arange(hidden.shape[1]) // size
        mask = torch.where(block[:, None] >= block[None], 0.0, torch.finfo(torch.float32).min)
        return arguments, options | {"attention_mask": mask[None, None]}

    for name, module in network.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_pre_hook(attend, with_kwargs=True)
    return network


@pytest.mark.parametrize("size", [2, 7, 32, 64])
@pytest.mark.parametrize("step", ["trainer", "captured"])
def test_a_network_that_sees_the_rest_of_a_block_is_refused(trained, size, step):
    with pytest.raises(MethodError, match="its network sees the tokens that it must predict"):
        trained(Method(name=f"blocks-{size}-{step}", transform=partial(in_blocks, size=size), step=step))


def knows_the_next(network):
    """Says the next token, and so changes one logit in many."""

    def tell(module, arguments, options, outputs):
        columns, ids = options["logits_to_keep"], options["input_ids"].roll(-1, 1)
        outputs["logits"] = outputs.logits + 0.2 * one_hot(ids[:, columns], outputs.logits.shape[-1])
        return outputs

    network.register_forward_hook(tell, with_kwargs=True)
    return network


def test_a_network_that_sees_the_next_token_alone_is_refused(trained):
    with pytest.raises(MethodError, match="its network sees the tokens that it must predict"):
        trained(Method(name="knows", transform=knows_the_next))


def freeze_embeddings(network):
    network.get_input_embeddings().requires_grad_(False)
    return network


def test_a_transform_is_trained_as_it_is(trained):
    own = trained(Method(name="frozen", transform=freeze_embeddings))
    assert own.trainable_parameters < own.parameters == trained().parameters
    assert own.data_note is None
    assert own.heldout_loss_before == trained().heldout_loss_before


def of_each_token(outputs, labels, num_items_in_batch):
    return cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")


def of_nothing(outputs, labels, num_items_in_batch):
    cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:])


def detached(outputs, labels, num_items_in_batch):
    return of_each_token(outputs, labels, num_items_in_batch).mean().detach()


def of_two(outputs, labels):
    return of_each_token(outputs, labels, None).mean()


class WithoutLabels(Beginnings):
    def __call__(self, rows):
        return {name: value for name, value in self.collate(rows).items() if name != "labels"}


def no_collator(collate):
    return None


def nothing_to_train(network):
    return network.requires_grad_(False)


def wrapped(network):
    return torch.nn.Sequential(network)


def twice_held(network, arguments):
    weights = list(network.parameters())
    return torch.optim.SGD([{"params": weights}, {"params": weights[:1]}], lr=arguments.learning_rate)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (
            {"compute_loss": of_each_token},
            "its compute_loss .*:of_each_token returns a tensor of 8 x 255: return one num",
        ),
        ({"compute_loss": of_nothing}, "its compute_loss .*:of_nothing returns a NoneType: return a tensor"),
        ({"compute_loss": detached}, "its compute_loss .*:detached returns a loss without a gradient"),
        ({"compute_loss": of_two}, "its compute_loss .*:of_two cannot be called .*num_items_in_batch"),
        ({"data_collator": WithoutLabels}, "its data_collator .*:WithoutLabels makes a batch without labels"),
        ({"data_collator": no_collator}, "its data_collator .*:no_collator returns a NoneType: return a collator"),
        ({"transform": nothing_to_train}, "its transform .*:nothing_to_train leaves nothing to train"),
        ({"transform": wrapped}, "its transform .*:wrapped returns a Sequential, which has no config"),
        ({"optimizer": twice_held}, "its optimizer .*:twice_held cannot be made .*more than one parameter group"),
    ],
)
def test_what_cannot_train_is_one_line_that_names_it(trained, own, expected):
    with pytest.raises(MethodError, match=f"method wrong: {expected}") as raised:
        trained(Method(name="wrong", **own))
    assert "\n" not in str(raised.value)


class Mistaken(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        raise KeyError("loss")


def test_an_error_in_somebodys_code_is_told_with_its_place(micro, small_corpus, folder):
    method = replace(BASELINE, name="mistaken", callbacks=(Mistaken,))
    trial = Trial(model=micro, method=method, target=targets.CPU, corpus=small_corpus, epochs=1)
    with Child(trial, folder) as child:
        outcome = child.finish()
    assert isinstance(outcome, Crashed)
    line = Mistaken.on_step_end.__code__.co_firstlineno + 1
    assert outcome.reason == f"KeyError: 'loss' (on_step_end in test_seen.py, line {line})"


class Records(TrainerCallback):
    told: ClassVar[list[str]] = []

    def on_epoch_begin(self, *_, **__):
        Records.told.append("epoch")

    def on_epoch_end(self, *_, **__):
        Records.told.append("end")


def test_what_a_callback_does_is_of_the_round(micro, small_corpus, folder, monkeypatch):
    method = replace(BASELINE, name="records", callbacks=(Records,))
    trial = Trial(model=micro, method=method, target=targets.CPU, corpus=small_corpus, epochs=2)
    meter, owner = Meter(CPU, 0.0), Unattended()
    monkeypatch.setattr(Records, "told", [])
    monkeypatch.setattr(owner, "await_request", lambda request: Records.told.append(request))
    monkeypatch.setattr(owner, "round_ended", lambda: Records.told.append("round ended"))
    worker.set_up(trial, CPU, meter, owner, folder).trainer.train()
    assert Records.told == ["round", "epoch", "end", "round ended"] * 2
