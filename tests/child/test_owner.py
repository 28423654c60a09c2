"""Real children, on the GPU where there is one."""

import importlib
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightweight import corpus, models, targets
from lightweight.child import handle, helper, owner, worker
from lightweight.child.owner import Child
from lightweight.methods import BASELINE, LORA, QLORA, Method
from lightweight.preload import peft
from lightweight.targets import MiB, Target
from lightweight.trial import Completed, Crashed, Diverged, OutOfMemory, TimedOut


def test_steps_that_nobody_asks_for_are_not_reported(trial, folder, monkeypatch):
    reports = []
    monkeypatch.setattr(
        owner._Rank,
        "receive",
        lambda rank, receive=owner._Rank.receive: reports.append(receive(rank)) or reports[-1],
    )
    with Child(trial, folder) as child:
        reports.clear()
        child.round()
        assert child.rounds_done == 1
    assert [type(report) for report in reports] == [worker.RoundEnded]


@pytest.mark.parametrize("method", [BASELINE, LORA, QLORA])
def test_a_trial_trains_its_whole_job_round_by_round(trial, folder, method):
    steps = []
    job = replace(trial, method=method)
    with Child(job, folder, on_step=lambda _, step, loss: steps.append((step, loss))) as child:
        assert child.outcome is None
        child.round()
        assert (child.rounds_done, [step for step, _ in steps]) == (1, [1, 2, 3])
        child.round()
        assert child.rounds_done == 2
        outcome = child.finish()
    assert isinstance(outcome, Completed), outcome
    measured = outcome.measured
    assert [step for step, _ in steps] == list(range(1, 7))
    assert len(measured.train_loss) == len(measured.step_seconds) == 6
    assert measured.heldout_loss_before is not None
    if method is BASELINE:
        assert measured.heldout_loss_after is not None
        assert measured.heldout_loss_after < measured.heldout_loss_before
    assert set(measured.phase_seconds) == {"start", "build", "evaluate", "train", "save"}
    assert 0 < sum(measured.step_seconds) <= measured.phase_seconds["train"]
    saved = {file.name for file in (folder / "saved").iterdir()}
    assert ("model.safetensors" if method is BASELINE else "adapter_model.safetensors") in saved


ASKS = """
import os
import pathlib
import transformers

pathlib.Path(__file__).with_name(str(os.getpid())).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))

class Nothing(transformers.TrainerCallback):
    pass
"""


def test_a_methods_module_is_imported_where_only_its_trials_gpus_are_seen(trial, folder, tmp_path, monkeypatch):
    """It may ask torch for the device's properties, from when on another choice would come too late: of two workers
    both would train on the first GPU."""
    (tmp_path / "asks_for_gpus.py").write_text(ASKS)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("asks_for_gpus")
    method = replace(BASELINE, name="mine", callbacks=(module.Nothing,))
    with Child(replace(trial, method=method, target=targets.CPU, device_index=None), folder) as child:
        assert child.outcome is None, child.outcome
    assert (tmp_path / str(child.pids[0])).read_text() == ""


def test_of_a_long_corpus_it_is_told_how_far_its_encoding_is(trial, folder):
    talks = tuple(corpus.pair(f"{number}", "a") for number in range(1200))
    long = replace(trial, corpus=replace(trial.corpus, train=talks), max_length=16, max_steps=1)
    told: list[str] = []
    with Child(long, folder, on_told=lambda trial, text: told.append(f"{trial.name}: {text}")) as child:
        assert child.outcome is None
    assert len(told) == 100
    assert told[0] == "micro x baseline: encoding 1,200 examples: 0 %"
    assert told[-1] == "micro x baseline: encoding 1,200 examples: 99 %"


def test_finishing_trains_what_is_left(trial, folder):
    with Child(trial, folder) as child:
        child.round()
        assert isinstance(child.finish(), Completed)
    assert child.rounds_done == 2


def test_one_seed_gives_one_result_and_another_another(trial, tmp_path):
    losses = []
    for index, seed in enumerate((3, 3, 4)):
        (tmp_path / str(index)).mkdir()
        with Child(replace(trial, seed=seed), tmp_path / str(index)) as child:
            losses.append(child.finish().measured.train_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # a GPU adds up in an order of its own
    assert losses[0] != pytest.approx(losses[2], rel=1e-5)


def test_two_live_children_take_turns(trial, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    with Child(trial, tmp_path / "a") as a, Child(trial, tmp_path / "b") as b:
        assert a.pids != b.pids
        for child in (a, b, b, a):
            child.round()
        assert isinstance(a.finish(), Completed)
        assert isinstance(b.finish(), Completed)


def test_a_loss_that_is_no_number_has_diverged(trial, folder):
    method = replace(BASELINE, training_arguments={"learning_rate": 1e30, "max_grad_norm": 0})
    with Child(replace(trial, method=method), folder) as child:
        outcome = child.finish()
    assert isinstance(outcome, Diverged), outcome
    assert outcome.step >= 2
    assert outcome.reason in (f"training loss is {value} at step {outcome.step}" for value in ("nan", "inf"))


def test_a_silent_child_times_out_and_is_killed(trial, folder):
    with Child(trial, folder, silence_seconds=30) as child:
        child.silence_seconds = 1.0
        os.kill(child.pids[0], signal.SIGSTOP)
        started = time.perf_counter()
        child.round()
        assert time.perf_counter() - started < 3
    assert isinstance(child.outcome, TimedOut)
    assert child.outcome.reason == "reported nothing for 1 s and was killed"
    assert child.outcome.phase == "train"
    with pytest.raises(ProcessLookupError):
        os.kill(child.pids[0], 0)


def test_an_exception_in_the_child_is_a_crash_with_its_traceback_and_the_next_trial_is_untouched(trial, tmp_path):
    """Token ids beyond the vocabulary, which on a GPU would be a device-side assert, fatal to its process."""
    narrow = replace(trial.model, name="narrow", architecture=trial.model.architecture | {"vocab_size": 64})
    (tmp_path / "bad").mkdir()
    (tmp_path / "good").mkdir()
    written = helper.call(models.write, tmp_path / "bad", narrow, tmp_path / "narrow", 0)
    with Child(replace(trial, model=written), tmp_path / "bad") as child:
        outcome = child.finish()
    assert isinstance(outcome, Crashed)
    assert outcome.phase == "build"
    assert outcome.reason.startswith("ModelError: model narrow: its tokenizer gives token")
    assert "check_rows" in outcome.details
    assert "check_rows" in (tmp_path / "bad" / "log").read_text()
    with Child(trial, tmp_path / "good") as child:
        assert isinstance(child.finish(), Completed)


@pytest.mark.needs_cuda
@pytest.mark.parametrize(("room_mib", "phase"), [(64, "build"), (350, "evaluate"), (3500, "forward")])
def test_out_of_memory_is_an_outcome_with_its_phase_and_the_next_trial_is_untouched(trial, tmp_path, room_mib, phase):
    """98 MiB of weights; evaluating 4 sequences makes two activations of 1563 MiB, training on 8 two of 3125 MiB."""
    large = replace(trial.model, name="large", architecture=trial.model.architecture | {"ffn_dim": 400_000})
    target = Target(name="small", capability=targets.HOPPER, total_bytes=targets.CONTEXT_BYTES + room_mib * MiB)
    (tmp_path / "large").mkdir()
    (tmp_path / "next").mkdir()
    written = helper.call(models.write, tmp_path / "large", large, tmp_path / "weights", 0)
    with Child(replace(trial, model=written, target=target), tmp_path / "large") as child:
        outcome = child.finish()
    assert isinstance(outcome, OutOfMemory), outcome
    assert outcome.phase == phase
    assert outcome.budget_bytes == room_mib * MiB
    assert outcome.requested_bytes is not None
    assert outcome.measured.peak_reserved_bytes <= room_mib * MiB
    with Child(trial, tmp_path / "next") as child:
        assert isinstance(child.finish(), Completed)


def test_a_method_that_cannot_be_built_is_a_crash_in_build(trial, folder):
    method = Method(name="typo", training_arguments={"torch_empty_cache_steps": -1})
    with Child(replace(trial, method=method), folder) as child:
        assert isinstance(child.outcome, Crashed)
        assert child.outcome.phase == "build"
        assert "torch_empty_cache_steps" in child.outcome.reason


def test_leaving_early_leaves_no_process_behind(trial, folder):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Child(trial, folder, on_step=interrupt) as child:
        child.round()
    with pytest.raises(ProcessLookupError):
        os.kill(child.pids[0], 0)


def test_an_interruption_while_building_leaves_no_process_behind(trial, folder, monkeypatch):
    def interrupt(child: Child, _: type | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Child, "_await", interrupt)
    child = Child(trial, folder)
    with pytest.raises(KeyboardInterrupt):
        child.__enter__()
    with pytest.raises(ProcessLookupError):
        os.kill(child.pids[0], 0)


def test_a_trial_whose_owner_is_gone_ends_by_itself(trial, folder):
    with Child(trial, folder) as child:
        (rank,) = child._ranks
        rank.connection.close()
        rank.process.join(timeout=20)
        assert rank.process.exitcode == 0


def test_peaks_on_the_host_are_the_trials_own(trial, tmp_path):
    """A trial that follows a larger one in the same session reports its own peak."""
    trial = replace(trial, target=targets.CPU, device_index=None)
    large = replace(trial.model, name="large", architecture=trial.model.architecture | {"ffn_dim": 100_000})
    peaks = []
    for name, model in (("large", large), ("small", trial.model)):
        (tmp_path / name).mkdir()
        if name == "large":
            model = helper.call(models.write, tmp_path / name, model, tmp_path / "weights", 0)
        with Child(replace(trial, model=model, max_steps=1), tmp_path / name) as child:
            outcome = child.finish()
        assert isinstance(outcome, Completed), outcome
        assert outcome.measured.host_peak_bytes is not None
        peaks.append(outcome.measured.host_peak_bytes)
    assert peaks[0] > peaks[1] + 4 * 6_400_000 * 4  # weight, gradient and two moments of 6.4 million more parameters


def test_the_saved_adapter_loads_with_peft(trial, folder):
    from lightweight.preload import peft

    with Child(replace(trial, method=LORA), folder) as child:
        assert isinstance(child.finish(), Completed)
    base = models.load(trial.model, torch.float32, torch.device("cpu"), None)
    loaded = peft.PeftModel.from_pretrained(base, str(Path(folder) / "saved"))
    assert any("lora_" in name for name, _ in loaded.named_parameters())


def test_the_memory_of_the_host_that_runs_out_is_an_outcome_with_the_limit_in_force(trial, folder, monkeypatch):
    monkeypatch.setattr(worker, "run", run_within_a_limit)
    with Child(replace(trial, target=targets.CPU, device_index=None), folder) as child:
        outcome = child.finish()
    assert isinstance(outcome, OutOfMemory), outcome
    assert outcome.phase == "train"
    assert "the host's memory: the limit of ulimit -v is" in outcome.reason


def run_within_a_limit(*arguments) -> None:
    """`worker.run`, with an allocation in the second step beyond what `ulimit -v` allows."""
    import resource

    original = worker._OwnersEnd.step_ended

    def greedy(owner) -> None:
        original(owner)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
        torch.empty(2**32)

    worker._OwnersEnd.step_ended = greedy  # type: ignore[assignment]
    RUN(*arguments)


RUN = worker.run


def test_a_child_whose_folder_is_gone_says_so(trial, folder):
    folder.rmdir()
    with Child(trial, folder) as child:
        outcome = child.finish()
    assert isinstance(outcome, Crashed)
    assert (outcome.phase, outcome.reason.partition(":")[0]) == ("start", "FileNotFoundError")


def test_training_that_ends_early_completes_with_the_steps_it_took(trial, folder, monkeypatch):
    monkeypatch.setattr(worker, "run", run_and_stop_early)
    with Child(trial, folder) as child:
        outcome = child.finish()
    assert isinstance(outcome, Completed), outcome
    assert len(outcome.measured.train_loss) == 2


def run_and_stop_early(*arguments) -> None:
    import transformers

    on_step_end = transformers.trainer_callback.DefaultFlowCallback.on_step_end

    def stop(flow, args, state, control, **rest):
        control = on_step_end(flow, args, state, control, **rest)
        control.should_training_stop |= state.global_step == 2
        return control

    transformers.trainer_callback.DefaultFlowCallback.on_step_end = stop  # type: ignore[assignment]
    RUN(*arguments)


STAND_IN = """
import sys
assert "transformers" not in sys.modules and "torch" not in sys.modules, "unsloth comes first"

class FastLanguageModel:
    def from_pretrained(location, *, dtype, device_map, use_gradient_checkpointing, **_):
        from transformers import AutoModelForCausalLM
        return AutoModelForCausalLM.from_pretrained(location, dtype=dtype, device_map=device_map), None

    def get_peft_model(network, *, use_gradient_checkpointing, random_state, **settings):
        from lightweight.preload import peft
        return peft.get_peft_model(network, peft.LoraConfig(task_type="CAUSAL_LM", **settings))

    def for_training(network, **_):
        network.train()
"""


def test_a_peers_trial_runs_in_a_fresh_interpreter_that_imports_it_first(trial, folder, tmp_path, monkeypatch):
    """With a stand-in of its interface that is peft underneath: the suite's losses through either are the same."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "unsloth.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    method = replace(LORA, adapter=adapter, training_arguments={"per_device_train_batch_size": 8})
    losses = []
    for library in ("peft", "unsloth"):
        place = folder / library
        place.mkdir()
        with Child(replace(trial, method=replace(method, library=library)), place) as child:
            outcome = child.finish()
        assert isinstance(outcome, Completed), (place / "log").read_text()
        losses.append(outcome.measured.train_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert len(losses[1]) == trial.steps


def test_of_a_log_that_is_larger_than_memory_its_end_is_read(trial, folder):
    with owner.Child(trial, folder) as child:
        with (folder / "log").open("ab") as log:
            log.truncate(2**42)
            log.seek(0, os.SEEK_END)
            log.write("마지막 words".encode())
        os.kill(child.pids[0], signal.SIGKILL)
        child.round()
    assert isinstance(child.outcome, Crashed)
    assert child.outcome.details.endswith("마지막 words") and len(child.outcome.details) == handle.LAST_WORDS
