import json
import math
import time

import pytest
import torch

from lightweight.training.meter import DivergedError, Meter


@pytest.fixture
def meter():
    return Meter(torch.device("cpu"), start_seconds=0.5)


def test_a_steps_loss_is_the_sum_over_its_forward_passes(meter):
    meter.begin_round()
    for losses in ([1.0, 2.0], [3.0, 0.5]):
        for loss in losses:
            meter.add_loss(torch.tensor(loss))
        meter.end_step()
    assert meter.steps == 2
    assert meter.latest_loss == 3.5
    meter.end_round()
    assert meter.measurements().train_loss == (3.0, 3.5)


def test_step_seconds_lose_nothing_between_the_steps(meter, monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter.begin_round()
    for step in range(3):
        now += 0.02
        meter.add_loss(torch.tensor(1.0))
        meter.end_step()
        now += 0.01 + step  # the Trainer's own work between two steps
    meter.end_round()
    assert meter.measurements().step_seconds == pytest.approx((0.02, 0.03, 1.03))


def test_cpu_seconds_are_the_work_of_whole_rounds_and_neither_waiting_nor_what_lies_between_them(meter):
    def work(seconds):
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass

    for _ in range(2):
        work(0.3)
        meter.begin_round()
        time.sleep(0.3)
        work(0.1)
        meter.add_loss(torch.tensor(1.0))
        meter.end_step()
        meter.end_round()
    meter.begin_round()
    work(0.3)  # of a round that does not end
    measured = meter.measurements()
    assert measured.cpu_seconds == pytest.approx(0.2, abs=0.05)
    assert sum(measured.step_seconds) > 0.8


def test_phases_are_counted_without_the_waiting(meter):
    with meter.during("build"):
        time.sleep(0.05)
        with meter.waiting():
            time.sleep(0.2)
    phases = meter.measurements().phase_seconds
    assert phases["start"] == 0.5
    assert 0.05 <= phases["build"] < 0.15


def test_the_phase_stays_where_it_failed(meter):
    def fail() -> None:
        meter.phase = "backward"
        raise RuntimeError

    with pytest.raises(RuntimeError), meter.during("train"):
        fail()
    assert meter.phase == "backward"
    assert "train" in meter.measurements().phase_seconds


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_told_with_its_step(meter, loss):
    meter.begin_round()
    for value in (2.0, loss, 1.0):
        meter.add_loss(torch.tensor(value))
        meter.end_step()
    with pytest.raises(DivergedError, match=f"{loss} at step 2") as raised:
        meter.end_round()
    assert raised.value.step == 2
    assert len(meter.measurements().train_loss) == 3


@pytest.mark.parametrize(("counts", "why"), [((0, 0), ": none of its tokens has a label"), ((0, 3), ""), ((), "")])
def test_a_loss_of_no_token_is_told(meter, counts, why):
    meter.begin_round()
    meter.add_labels(torch.tensor(5))
    for value, labelled in ((2.0, ()), (math.nan, counts)):
        for count in labelled:
            meter.add_labels(torch.tensor(count))
        meter.add_loss(torch.tensor(value))
        meter.end_step()
    with pytest.raises(DivergedError) as raised:
        meter.end_round()
    assert str(raised.value) == f"training loss is nan at step 2{why}"


def test_a_trial_that_fails_in_a_round_keeps_what_it_had_and_is_asked_nothing_about_it(meter):
    meter.begin_round()
    meter.add_loss(torch.tensor(math.nan))
    meter.end_step()
    meter.add_loss(torch.tensor(1.0))  # the forward pass after it, whose backward ran out of memory
    meter.read_device()
    assert len(meter.measurements().step_seconds) == len(meter.measurements().train_loss) == 1


def test_a_cpu_has_no_device_memory_but_a_host(meter):
    measured = meter.measurements()
    assert measured.peak_allocated_bytes is None
    assert measured.host_peak_bytes > 50 * 2**20  # torch alone is more


def test_a_steps_tokens_are_the_sum_over_its_forward_passes_and_go_on_after_a_checkpoint(meter):
    meter.begin_round()
    for passes in ([(3, 8), (2, 8)], [(4, 8)]):
        for real, padded in passes:
            meter.add_loss(torch.tensor(1.0))
            meter.add_tokens(torch.tensor(real), padded)  # ranks add theirs up on the device
        meter.see_rates([1e-3, 0.01 / len(passes)])
        meter.end_step()
    resumed = Meter(torch.device("cpu"), 0.0)
    resumed.resume(**json.loads(json.dumps(meter.state())))
    for one in (meter, resumed):
        one.end_round()
        measured = one.measurements()
        assert (measured.step_tokens, measured.step_padded_tokens) == ((5, 4), (16, 8))
        assert all(type(count) is int for count in measured.step_tokens)
        assert measured.learning_rates == (1e-3, 0.01)


def test_a_checkpoint_that_counted_no_tokens_goes_on_without(meter):
    meter.resume(train_loss=[1.0, 2.0], step_seconds=[0.1, 0.1], heldout_losses=[3.0])
    meter.see_rates([1e-5])  # of the rest alone
    assert meter.measurements().step_tokens == (0, 0)
    assert meter.measurements().learning_rates == ()
