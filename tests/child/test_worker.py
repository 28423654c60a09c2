import gc
import subprocess
import sys
from dataclasses import replace
from multiprocessing import Pipe

import pytest
import torch

from lightweight import models, targets
from lightweight.child import worker
from lightweight.cli.train import Unattended
from lightweight.methods import BASELINE, LORA, QLORA
from lightweight.models import ModelError
from lightweight.preload import peft
from lightweight.training.meter import Meter
from lightweight.trial import Trial

pytestmark = pytest.mark.usefixtures("without_gpu")

CPU = torch.device("cpu")


@pytest.fixture
def trial(micro, small_corpus):
    return Trial(model=micro, method=BASELINE, target=targets.CPU, corpus=small_corpus, epochs=1)


def test_the_worker_imports_no_pytest_no_plugin_and_no_report():
    program = (
        "import sys, lightweight.child.worker\n"
        "found = {'pytest', 'lightweight.plugin', 'lightweight.report', 'lightweight.record'} & set(sys.modules)\n"
        "assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_trial_computes_with_the_threads_it_says_and_never_collects_what_was_imported(trial, tmp_path, monkeypatch):
    had, found = torch.get_num_threads(), []
    gc.unfreeze()  # what every test has frozen
    monkeypatch.setattr(worker, "redirect_output", lambda path: None)
    monkeypatch.setattr(worker, "_complete", lambda *_: found.append((torch.get_num_threads(), gc.get_freeze_count())))
    _, end = Pipe()
    try:
        for threads in (had + 2, None):
            worker.run(end, replace(trial, threads=threads), tmp_path, 0.0)
            torch.set_num_threads(had)
    finally:
        torch.set_num_threads(had)
        gc.unfreeze()
    assert [threads for threads, _ in found] == [had + 2, had]
    assert all(frozen > 100_000 for _, frozen in found)


@pytest.mark.parametrize("method", [BASELINE, LORA, QLORA])
def test_a_method_trains_what_it_says(trial, method):
    network = worker.build(replace(trial, method=method), CPU)
    trainable = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    if method is BASELINE:
        assert len(trainable) == len(list(network.parameters()))
    elif method is LORA:
        assert len(trainable) == 4  # q and v of one layer, two matrices each
    else:
        assert len(trainable) == 12  # q, k, v, out, fc1, fc2; not the head
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32, torch.uint8}


def test_building_leaves_the_method_as_it_was(trial):
    assert isinstance(QLORA.adapter, peft.LoraConfig)
    before = QLORA.adapter.to_dict()
    worker.build(replace(trial, method=QLORA), CPU)
    assert QLORA.adapter.to_dict() == before
    assert QLORA.adapter.target_modules == "all-linear"


def test_parameters_of_a_4_bit_network_are_counted_as_what_they_pack(trial):
    plain = models.load(trial.model, torch.float32, CPU, None)
    network = worker.build(replace(trial, method=QLORA), CPU)
    adapter = models.count_parameters(network, trainable=True)
    assert models.count_parameters(network) - adapter == sum(p.numel() for p in plain.parameters())


def test_bf16_weights_on_a_target_without_bf16_are_refused(trial):
    # past the check of the trial's own settings, as a quantization config with its own idea of a dtype would be
    method = replace(BASELINE, weights_dtype="bfloat16")
    late = replace(trial, method=method)
    object.__setattr__(late, "target", targets.T4)
    with pytest.raises(TypeError, match="is bfloat16, which target t4 does not have"):
        worker.build(late, CPU)


def test_a_training_that_goes_on_after_its_last_round_is_one_clear_line():
    here, there = Pipe()
    owner = worker._OwnersEnd(here, Meter(CPU, 0.0), tells_steps=False)
    there.send("finish")
    with pytest.raises(RuntimeError, match="training goes on after step 0, the last of its trial") as raised:
        owner.await_request("round")
    assert "\n" not in str(raised.value)


def test_what_was_adapted_and_how_weights_are_held_is_in_the_measurements(trial, folder):
    found = {}
    for method in (BASELINE, LORA, QLORA):
        meter = Meter(CPU, 0.0)
        worker.set_up(replace(trial, method=method), CPU, meter, Unattended(), folder)
        measured = meter.measurements()
        found[method.name] = (measured.adapted_layers, measured.base_quantization)
    assert found["baseline"] == ((), None)
    assert found["lora"] == (("q_proj", "v_proj"), None)
    assert found["qlora"] == (("fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"), "bitsandbytes 4-bit")


def test_rows_that_the_network_has_no_place_for_stop_a_trial_before_its_first_step(trial, folder):
    with pytest.raises(ModelError, match="rows of 300 tokens, where it has 256 positions: take a smaller max_length"):
        worker.set_up(replace(trial, max_length=300), CPU, Meter(CPU, 0.0), Unattended(), folder)
