from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import peft
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from conftest import rows_of
from lightweight import models
from lightweight.child import worker
from lightweight.corpus import IGNORED, Row
from lightweight.methods import BASELINE, QLORA, Method, MethodError, adapt
from lightweight.training import ranks, stock
from lightweight.training.heldout import heldout_loss
from lightweight.training.meter import Meter

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


def prepare(trial, folder, network=None, **overrides):
    tokenizer = models.load_tokenizer(trial.model)
    rows = rows_of(trial, tokenizer)
    meter, owner = Meter(CPU, 0.0), Unattended()
    network = network or worker.build(trial, CPU)
    trainer = stock.make_trainer(trial, network, rows, meter, owner, folder, **overrides)
    return trainer, rows, meter, owner


def test_losses_are_those_the_trainer_itself_logs(trial, folder):
    trainer, _, meter, _ = prepare(trial, folder, logging_strategy="steps", logging_steps=1)
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


def small(kind, **settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = transformers.AutoConfig.for_model(kind, **sizes, **heads, **settings)
    return transformers.AutoModelForCausalLM.from_config(config)


ADAPTERS = {
    "adalora": peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=8,
        target_r=4,
        tinit=1,
        tfinal=1,
        total_step=10,
        target_modules=["q_proj"],
    ),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, encoder_hidden_size=16),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8),
}


class Allocates(transformers.TrainerCallback):
    """As AdaLoRA asks of whoever trains it."""

    def on_optimizer_step(self, args, state, control, model=None, **_):
        assert model is not None
        model.base_model.update_and_allocate(state.global_step)


@pytest.mark.parametrize("callbacks", [(), (Allocates,)])
def test_adalora_moves_its_ranks_once_a_step_by_the_suite_or_by_the_methods_own_callback(
    trial, folder, callbacks, monkeypatch
):
    asked = []
    allocate = peft.AdaLoraModel.update_and_allocate
    monkeypatch.setattr(
        peft.AdaLoraModel, "update_and_allocate", lambda model, step: (asked.append(step), allocate(model, step))
    )
    adapter = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", total_step=4, init_r=4, target_r=1, tfinal=1, target_modules=["q_proj"]
    )
    method = Method(name="adalora", adapter=adapter, callbacks=callbacks)
    network = adapt(method, small("llama"))
    trainer, *_ = prepare(replace(trial, max_length=64, method=method, max_steps=3), folder, network)
    trainer.train()
    assert asked == [0, 1, 2]
    kept = network.peft_config["default"].rank_pattern
    assert 0 < sum(map(sum, kept.values())) < adapter.init_r * len(kept)


def test_a_network_whose_loss_no_trained_weight_takes_part_in_is_one_line(trial, folder):
    """As Reformer's, whose layers are computed without a graph, and phi4_multimodal's, whose adapters see images."""
    trainer, *_ = prepare(trial, folder)
    forward = trainer.model.forward
    trainer.model.forward = torch.no_grad()(forward)
    with pytest.raises(MethodError, match="method baseline: no weight that it trains takes part in the loss of OPT"):
        trainer.train()


@pytest.mark.parametrize("name", [None, "prompt"])
def test_smoothed_labels_are_those_of_the_next_token_also_behind_virtual_ones(trial, folder, name):
    adapter = ADAPTERS.get(name)
    arguments = {"label_smoothing_factor": 0.3, "per_device_train_batch_size": 32}
    method = Method(name="smooth", adapter=adapter, training_arguments=arguments)
    trial = replace(trial, method=method, max_steps=1, max_length=64)
    trainer, rows, meter, _ = prepare(trial, folder, adapt(method, small("llama")))
    batch = {key: trainer.data_collator(rows)[key] for key in ("input_ids", "attention_mask", "labels")}
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = trainer.model(**batch, use_cache=False).logits[:, -64:-1]
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, label_smoothing=0.3)
    trainer.train()
    assert meter.measurements().train_loss[0] == pytest.approx(expected.item(), abs=1e-4)


def test_a_methods_data_seed_orders_the_pairs(trial, folder):
    def order(**arguments):
        method = replace(BASELINE, training_arguments=arguments)
        trainer, *_ = prepare(replace(trial, method=method), folder)
        drawn = list(ranks.draws(trainer, trainer.train_dataset))
        assert drawn == [number for batch in trainer.get_train_dataloader().batch_sampler for number in batch]
        return drawn

    assert order(data_seed=1) == order(data_seed=1) != order()


def test_what_training_arguments_refuse_is_one_of_the_methods_errors(trial, folder):
    method = replace(BASELINE, training_arguments={"torch_empty_cache_steps": -1})
    with pytest.raises(MethodError, match=r"method baseline: TrainingArguments refuse it: .*bigger than 0"):
        prepare(replace(trial, method=method), folder)


@pytest.mark.skipif(find_spec("galore_torch") is not None, reason="needs an optimizer whose package is missing")
def test_an_optimizer_whose_package_is_missing_is_one_of_the_methods_errors(trial, folder):
    method = replace(BASELINE, training_arguments={"optim": "galore_adamw", "optim_target_modules": ["q_proj"]})
    with pytest.raises(MethodError, match=r"method baseline: TrainingArguments refuse it: .*galore_torch") as raised:
        prepare(replace(trial, method=method), folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [2, 8, 64])
def test_tokens_are_those_that_each_step_really_sees(trial, folder, size):
    """20 pairs: 64 a step see no more than 20, and the third step of 8 sees 4."""
    arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size or 1}
    trial = replace(trial, method=replace(BASELINE, training_arguments=arguments))
    trainer, rows, meter, _ = prepare(trial, folder)
    trainer.train()
    measured = meter.measurements()
    assert len(measured.step_tokens) == trial.steps
    assert sum(measured.step_tokens) == 2 * sum(len(row["input_ids"]) for row in rows)
    of_epoch = [20 * 256] if size == 64 else [8 * 256, 8 * 256, 4 * 256]
    assert measured.step_padded_tokens == tuple(of_epoch * 2)


@pytest.mark.parametrize(("padded_to", "width"), [(None, 5), (8, 8)])
def test_a_batch_is_as_long_as_its_longest_row_or_as_it_is_told(padded_to, width):
    short, longer = (np.arange(10, 10 + length, dtype=np.int32) for length in (3, 5))
    rows: list[Row] = [
        {"input_ids": short, "labels": np.array([IGNORED, 11, 12], np.int32)},
        {"input_ids": longer, "labels": np.full(5, IGNORED, np.int32)},  # as what fills a rank's pass has none
    ]
    batch = stock.Collate(7, padded_to)(rows)
    rest = width - 5
    assert batch["input_ids"].tolist() == [[10, 11, 12, 7, 7, *[7] * rest], [10, 11, 12, 13, 14, *[7] * rest]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, *[0] * rest], [1] * 5 + [0] * rest]
    assert batch["labels"].tolist() == [[IGNORED, 11, 12] + [IGNORED] * (width - 3), [IGNORED] * width]
    assert batch[stock.TOKENS] == (3, 2 * width)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_qlora_trains_its_adapter_alone_and_after_an_evaluation_too(trial, folder):
    trainer, rows, meter, _ = prepare(replace(trial, method=QLORA), folder)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    heldout_loss(trainer, rows)
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
