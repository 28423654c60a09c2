"""The methods of experiments/own_methods.py: each is short, trains, is forecast, and is compared as any other is."""

import ast
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training.test_stock import CPU, Unattended
from transformers import Trainer

from conftest import turns
from lightweight import methods, models, record, targets
from lightweight.__main__ import main
from lightweight.child import worker
from lightweight.forecast import tracer
from lightweight.methods import BASELINE, LORA, LORA_CAPTURED, Method
from lightweight.models import Model
from lightweight.preload import peft
from lightweight.training.meter import Meter
from lightweight.trial import Trial

pytestmark = pytest.mark.usefixtures("without_gpu")

FILE = Path(__file__).parents[1] / "experiments" / "own_methods.py"
BESIDE = {
    "DORA": LORA,
    "PISSA": LORA,
    "LORA_PLUS": LORA,
    "LORA_PLUS_CAPTURED": LORA_CAPTURED,
    "MUON": BASELINE,
    "DFT": LORA,
}
"""The suite's method that each is a variant of."""

SMALL = Model(
    name="small",
    architecture={
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 384,
        "max_position_embeddings": 256,
    },
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    found, _ = models.find(SMALL)
    return models.write(found, tmp_path_factory.mktemp("small"), seed=0)


@pytest.fixture
def own(monkeypatch):
    """The method of that name in the file."""
    monkeypatch.syspath_prepend(FILE.parent)
    return lambda name: methods.named(f"{FILE}:{name}")


def test_each_takes_at_most_thirty_lines():
    lines = FILE.read_text("utf-8").splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("ADAPTER"))
    ends = [begin]
    for node in ast.parse(FILE.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in BESIDE:
            assert node.end_lineno is not None
            ends.append(node.end_lineno)
    own = [[line for line in lines[start:end] if line.strip()] for start, end in itertools.pairwise(ends)]
    assert len(own) == len(BESIDE)
    assert max(map(len, own)) <= 30


@pytest.mark.parametrize("name", BESIDE)
def test_it_trains_and_what_is_held_out_is_compared_alike(own, name, small, small_corpus, folder):
    beside, method = BESIDE[name], own(name).with_learning_rate(3e-3)
    measured = []
    for each in (beside.with_learning_rate(3e-3), method):
        trial = Trial(model=small, method=each, target=targets.CPU, corpus=small_corpus, epochs=2, max_length=96)
        meter = Meter(CPU, 0.0)
        prepared = worker.set_up(trial, CPU, meter, Unattended(), folder)
        worker.train(*prepared[:3], prepared.heldout, meter, lambda phase: None)
        worker.evaluate(prepared.trainer, prepared.heldout, meter)
        measured.append(meter.measurements())
    theirs, ours = measured
    assert ours.heldout_loss_before is not None and ours.heldout_loss_after is not None
    assert ours.heldout_loss_before == pytest.approx(theirs.heldout_loss_before, abs=1e-4)
    assert ours.heldout_loss_after < ours.heldout_loss_before - 1e-3
    assert ours.heldout_loss_after != theirs.heldout_loss_after
    assert (ours.step_tokens, ours.data_note) == (theirs.step_tokens, None)
    assert record.method_digest(method) != record.method_digest(beside.with_learning_rate(3e-3))
    assert bool(ours.captured is None) == bool(theirs.captured is None)


def test_a_captured_step_has_each_groups_own_rate(own, small, small_corpus, folder):
    """As the Trainer's, whose optimizer has one for A and sixteen times that for B."""
    losses, rates = [], []
    for method in (own("LORA_PLUS"), own("LORA_PLUS_CAPTURED"), LORA_CAPTURED):
        assert isinstance(method.adapter, peft.LoraConfig)
        adapter = replace(method.adapter, lora_dropout=0.0)
        arguments = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 2}
        method = replace(method, adapter=adapter, training_arguments=arguments)
        trial = Trial(model=small, method=method, target=targets.CPU, corpus=small_corpus, epochs=3, max_length=96)
        meter = Meter(CPU, 0.0)
        prepared = worker.set_up(trial, CPU, meter, Unattended(), folder)
        worker.train(*prepared[:3], prepared.heldout, meter, lambda phase: None)
        losses.append(meter.measurements().train_loss)
        rates.append(sorted({*meter.measurements().learning_rates}))
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)
    assert losses[2][-1] - losses[0][-1] > 1e-2
    assert rates == [[3e-3, 16 * 3e-3]] * 2 + [[3e-3]]


@pytest.mark.parametrize("name", BESIDE)
def test_it_is_forecast(own, name, small, small_corpus):
    peaks = {}
    for method in (BESIDE[name], own(name)):
        trial = Trial(model=small, method=method, target=targets.T4, corpus=small_corpus, max_length=96)
        traced = tracer.trace(trial, (7, 5))
        assert traced.trainable_parameters > 0
        held, most = {}, 0
        for tensor, size in traced.events:
            held[tensor] = size
            most = max(most, sum(held.values()))
        peaks[method.name] = most
    theirs, ours = peaks.values()
    assert 0.5 < ours / theirs < 2


def twice(collate):
    """Each batch is computed twice over."""

    def call(rows):
        return {name: torch.cat([v, v]) for name, v in collate(rows).items() if isinstance(v, torch.Tensor)}

    return call


class Reading(torch.optim.SGD):
    """Decides by numbers, which fake tensors do not have."""

    def step(self, closure=None):
        if self.param_groups[0]["params"][0].grad.norm().item() > 0:
            super().step(closure)


def reading(network, arguments):
    return Reading(network.parameters(), lr=arguments.learning_rate)


def trial_of(small, small_corpus, method):
    return Trial(model=small, method=method, target=targets.T4, corpus=small_corpus, max_length=96)


def test_a_forecast_has_the_batches_that_a_collator_makes(small, small_corpus):
    logits = []
    for collator in (None, twice):
        traced = tracer.trace(trial_of(small, small_corpus, Method(name="m", data_collator=collator)), (7, 5))
        logits.append(sum(size for name, size in traced.events if traced.causes.get(name) == "logits"))
    assert logits[1] >= 2 * logits[0] > 0


class TwoPasses(Trainer):
    """Computes each batch twice, as sharpness-aware training does."""

    def training_step(self, model, inputs, *others):
        super().training_step(model, dict(inputs), *others)
        model.zero_grad()
        return super().training_step(model, inputs, *others)


def test_a_forecast_counts_all_that_a_trainer_computes_of_a_batch(small, small_corpus):
    plain, twice_over = (
        tracer.trace(trial_of(small, small_corpus, method), (7, 5)).work.flop
        for method in (BASELINE, replace(BASELINE, name="m", trainer=TwoPasses))
    )
    assert twice_over == pytest.approx(2 * plain, rel=0.01)


def test_what_cannot_be_traced_is_named_in_a_line(small, small_corpus):
    with pytest.raises(tracer.ForecastError, match="small x m: optimizer test_own_methods:reading cannot") as raised:
        tracer.trace(trial_of(small, small_corpus, Method(name="m", optimizer=reading)), (7, 5))
    assert "\n" not in str(raised.value)


def test_the_command_line_plans_and_trains_it(base, tmp_path, capsys):
    assert main(["plan", str(base), "--method", f"{FILE}:MUON", "--target", "t4"]) == 0
    assert "muon" in capsys.readouterr().out
    corpus = tmp_path / "corpus.json"
    corpus.write_text(json.dumps(turns(12)), "utf-8")
    job = ["train", "--model", str(base), "--corpus", str(corpus), "--max-steps", "2", "--max-length", "64"]
    assert main([*job, "--method", f"{FILE}:MUON", "--output", str(tmp_path / "out")]) == 0
    (entry,) = record.load(tmp_path / "out" / "record.json").entries
    assert entry.own_code is not None
    assert entry.own_code["optimizer"]["import_path"] == "own_methods:MuonAndAdamW"
    assert len(entry.own_code["optimizer"]["source_sha256"]) == 64
    assert "its own optimizer" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_the_suite_trains_it_beside_its_own(pytester):
    pytester.makeconftest('pytest_plugins = ["lightweight.plugin"]')
    pytester.makepyfile(
        f"""
        from lightweight.models import Model
        MICRO = Model(name="small", architecture={SMALL.architecture!r})

        def test_cell(train, method):
            assert train(MICRO, method).kind == "completed"
        """
    )
    (pytester.path / "corpus.json").write_text(json.dumps(turns(12)), "utf-8")
    chosen = ("--method", "lora", "--method", f"{FILE}:DFT")
    result = pytester.runpytest("--benchmark-json=out.json", "--epochs=1", "-p", "no:cacheprovider", *chosen)
    result.assert_outcomes(passed=2)
    entries = json.loads((pytester.path / "out.json").read_text())["outcomes"]
    assert [(entry["method"], "own_code" in entry) for entry in entries] == [("lora", False), ("dft", True)]
    assert entries[0]["heldout_loss_before"] == entries[1]["heldout_loss_before"]
    result.stdout.fnmatch_lines(["Training losses on a scale of their own, unlike held-out ones: dft."])
