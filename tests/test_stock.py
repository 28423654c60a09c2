from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from lightweight import corpus, models, stock, targets, worker
from lightweight.corpus import IGNORED
from lightweight.meter import Meter
from lightweight.methods import BASELINE, QLORA, Method
from lightweight.trial import MAX_LENGTH, Trial

pytestmark = pytest.mark.usefixtures("without_gpu")

CPU = torch.device("cpu")


class Unattended:
    """An owner that asks for everything at once and keeps what it is told."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.steps = self.rounds = 0

    def training_began(self) -> None:
        self.requests.append("begin")

    def await_request(self, request: str) -> None:
        self.requests.append(request)

    def step_ended(self) -> None:
        self.steps += 1

    def round_ended(self) -> None:
        self.rounds += 1


@pytest.fixture
def trial(micro, small_corpus):
    return Trial(model=micro, method=BASELINE, target=targets.CPU, corpus=small_corpus, epochs=2)


def prepare(trial, folder):
    tokenizer = models.load_tokenizer(trial.model)
    rows = [corpus.encode(pair, tokenizer, MAX_LENGTH) for pair in trial.corpus.train]
    meter, owner = Meter(CPU, 0.0), Unattended()
    trainer = stock.make_trainer(trial, worker.build(trial, CPU), rows, meter, owner, folder)
    return trainer, rows, meter, owner


def test_a_round_is_an_epoch_and_training_goes_on_from_round_to_round(trial, folder):
    trainer, _, meter, owner = prepare(trial, folder)
    trainer.train()
    assert owner.requests == ["begin", "round", "round"]
    assert (owner.rounds, owner.steps) == (2, trial.steps) == (2, 6)
    losses = meter.measurements().train_loss
    assert len(losses) == 6
    assert trainer.state.global_step == 6
    assert losses[-1] < losses[0]


def test_losses_are_those_the_trainer_itself_logs(trial, folder):
    method = replace(BASELINE, training_arguments={"logging_strategy": "steps", "logging_steps": 1})
    trainer, _, meter, _ = prepare(replace(trial, method=method), folder)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert meter.measurements().train_loss == pytest.approx(logged, abs=1e-3)


def test_accumulated_steps_have_the_loss_of_one_large_batch(trial, folder):
    whole, split = (
        Method(name="m", training_arguments={"per_device_train_batch_size": size, "gradient_accumulation_steps": times})
        for size, times in ((8, 1), (2, 4))
    )
    losses = []
    for method in (whole, split):
        trainer, _, meter, _ = prepare(replace(trial, method=method), folder)
        trainer.train()
        losses.append(meter.measurements().train_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_the_order_of_pairs_is_the_seeds_whatever_the_method(trial, folder):
    orders = {}
    for method in (BASELINE, QLORA):
        for seed in (0, 1):
            trainer, *_ = prepare(replace(trial, method=method, seed=seed), folder)
            loader = trainer.get_train_dataloader()
            orders[method.name, seed] = [number for batch in loader.batch_sampler for number in batch]
    assert orders["baseline", 0] == orders["qlora", 0] != orders["baseline", 1] == orders["qlora", 1]
    assert sorted(orders["baseline", 0]) == list(range(20))


def test_max_steps_cut_the_job_short(trial, folder):
    trainer, _, _, owner = prepare(replace(trial, max_steps=4), folder)
    trainer.train()
    assert (owner.steps, owner.rounds) == (4, 2)


def test_heldout_loss_is_the_mean_over_answer_tokens_whatever_the_batch(trial, folder):
    trainer, rows, _, _ = prepare(trial, folder)
    rows = rows[:5]
    ids, labels = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels"))
    mask = torch.tensor([row["attention_mask"] for row in rows])
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=ids, attention_mask=mask).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED).item()
    for batch_size in (1, 2, 8):
        trainer.args.per_device_train_batch_size = batch_size
        assert stock.heldout_loss(trainer, rows) == pytest.approx(expected, abs=1e-5)


def test_qlora_trains_its_adapter_alone_and_after_an_evaluation_too(trial, folder):
    trainer, rows, meter, _ = prepare(replace(trial, method=QLORA), folder)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    stock.heldout_loss(trainer, rows)
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    assert any(not torch.equal(after[name], tensor) for name, tensor in trained.items())
    assert len(meter.measurements().train_loss) == 6


def test_the_meter_knows_forward_backward_and_optimizer(trial, folder):
    trainer, _, meter, _ = prepare(replace(trial, max_steps=1), folder)
    trainer.create_optimizer()
    seen = []
    trainer.model.register_forward_pre_hook(lambda *_: seen.append(meter.phase))
    next(trainer.model.parameters()).register_hook(lambda _: seen.append(meter.phase))
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(meter.phase))
    trainer.train()
    assert seen == ["forward", "backward", "optimizer"]
