"""Steps, jobs and their price from a made-up calibration, by hand."""

from dataclasses import replace

import pytest

from conftest import MICRO
from lightweight import targets
from lightweight.corpus import Corpus
from lightweight.forecast import step_time, work
from lightweight.forecast.replay import Trace
from lightweight.forecast.step_time import (
    DEVICE_ERROR,
    FORWARD,
    HOSTS,
    PCIE_REACHED,
    UNHIDDEN,
    JobLimits,
    JobTime,
    StepTime,
)
from lightweight.forecast.work import Work
from lightweight.methods import BASELINE, LORA, LORA_CAPTURED, QLORA, CapturedStep
from lightweight.targets import NATIVE
from lightweight.trial import Trial
from tests.forecast.test_calibration import H100, MADE_UP, PASS, SAMPLES, product

WORK = Work({product(4096): 2, PASS: 5}, operators=100)
DEVICE = 2 * SAMPLES[1].seconds + 5 * 1e-4
TRACE = Trace(parameters=1, trainable_parameters=1, work=WORK, flop_per_token=1e6)


def trial(method, **changes):
    corpus = Corpus(train=(), heldout=(), digest="")
    return Trial(model=MICRO, method=method, target=NATIVE, corpus=corpus, **changes)


def test_a_captured_step_takes_as_long_as_its_kernels():
    step = step_time.forecast(TRACE, trial(LORA_CAPTURED), H100, [MADE_UP])
    assert step is not None and step.is_calibrated
    assert step.low == step.high == step.seconds == pytest.approx(DEVICE)
    assert step.tokens_per_second == pytest.approx(8 * 256 / DEVICE)
    assert step.share_of_peak == pytest.approx(1e6 * 8 * 256 / DEVICE / 989.4e12)


def test_copies_to_the_host_take_what_the_kernels_beside_them_leave():
    """The forward pass has those to the host, the backward pass those back."""
    rate = 63e9 * PCIE_REACHED

    def seconds(**copied):
        kinds = {name: work.a_pass(f"copy {name} the host", int(size)) for name, size in copied.items()}
        kernels = {**WORK.kernels, **dict.fromkeys(kinds.values(), 2)}
        step = step_time.forecast(replace(TRACE, work=Work(kernels, 100)), trial(LORA_CAPTURED), H100, [MADE_UP])
        assert step is not None
        return step.seconds

    forward, backward = FORWARD * DEVICE * rate / 2, (1 - FORWARD) * DEVICE * rate / 2
    assert seconds(to=0.9 * forward, **{"from": 0.9 * backward}) == pytest.approx(DEVICE)
    assert seconds(to=2 * forward) == pytest.approx(DEVICE * (1 + FORWARD))
    assert seconds(**{"from": 2 * backward}) == pytest.approx(DEVICE * (2 - FORWARD))


def test_of_arithmetic_that_nobody_can_count_the_share_is_not_known_and_the_time_is():
    step = step_time.forecast(replace(TRACE, flop_per_token=None), trial(LORA_CAPTURED), H100, [MADE_UP])
    assert step is not None and step.seconds == pytest.approx(DEVICE) and step.share_of_peak is None


def test_a_stock_step_takes_as_long_as_python_within_an_interval_or_the_card():
    step = step_time.forecast(TRACE, trial(LORA), H100, [MADE_UP])
    assert step is not None
    assert step.high == pytest.approx(100 * 1e-5 * HOSTS[1] + UNHIDDEN * DEVICE * (1 + DEVICE_ERROR))
    assert step.low == pytest.approx(DEVICE * (1 - DEVICE_ERROR)) and step.low > 100 * 1e-5 * HOSTS[0]
    few = step_time.forecast(replace(TRACE, work=WORK._replace(operators=10)), trial(LORA), H100, [MADE_UP])
    assert few is not None
    assert few.high == pytest.approx(DEVICE * (1 + DEVICE_ERROR) + UNHIDDEN * 10 * 1e-5 * HOSTS[1])
    slow = replace(TRACE, work=WORK._replace(operators=10_000))
    step = step_time.forecast(slow, trial(LORA), H100, [MADE_UP])
    assert step is not None and step.low == pytest.approx(0.1 * HOSTS[0])
    assert step.high == pytest.approx(0.1 * HOSTS[1] + UNHIDDEN * DEVICE * (1 + DEVICE_ERROR))
    assert step.low < step.seconds < step.high


def test_each_kind_of_step_has_a_pace_of_its_own():
    paced = replace(MADE_UP, operator_seconds={"baseline": 1e-5, "lora": 2e-5, "qlora": 3e-5})
    slow = replace(TRACE, work=WORK._replace(operators=10_000))
    unpacking = replace(TRACE, work=Work({work.a_pass("dequantization", 2): 1}, operators=10_000))
    for method, trace, host in (
        (BASELINE, slow, 0.1),
        (LORA, slow, 0.2),
        (QLORA, unpacking, 0.3),
        (LORA, unpacking, 0.3),  # of a checkpoint that is stored in 4 bits
        (QLORA, slow, 0.2),  # whose quantization is undone
    ):
        step = step_time.forecast(trace, trial(method), H100, [paced])
        device = MADE_UP.seconds(trace.work.kernels) * (1 + DEVICE_ERROR)
        assert step is not None
        assert (step.low, step.high) == pytest.approx((host * HOSTS[0], UNHIDDEN * device + host * HOSTS[1]))


def test_a_step_that_is_not_captured_as_a_graph_waits_for_python_too():
    eager = replace(LORA_CAPTURED, step=CapturedStep(graph=False))
    step = step_time.forecast(TRACE, trial(eager), H100, [MADE_UP])
    assert step is not None and step.low < step.high


def test_another_card_is_forecast_from_its_data_sheet_and_says_so():
    step = step_time.forecast(TRACE, trial(LORA_CAPTURED), "Tesla T4", [MADE_UP])
    assert step is not None and not step.is_calibrated and step.measured == H100
    t4 = targets.rates("Tesla T4")
    assert step.seconds == pytest.approx(MADE_UP.seconds(WORK.kernels, t4))
    assert step.seconds > 5 * DEVICE


@pytest.mark.parametrize(
    ("card", "known", "changes"),
    [("Voodoo 2", [MADE_UP], {}), (H100, [], {}), (H100, [MADE_UP], {"world_size": 2})],
)
def test_what_nothing_is_known_of_is_not_forecast(card, known, changes):
    assert step_time.forecast(TRACE, trial(LORA, **changes), card, known) is None


def step(low=2.0, high=2.0):
    return StepTime(low=low, high=high, tokens=2048, flop=1.0, peak=1.0, measured=H100, is_calibrated=True)


def test_a_job_is_its_epochs_over_rows_of_the_corpus_and_costs_its_hours():
    job = JobLimits(tokens=100 * 256 - 1, epochs=3, price=0.5)
    assert job.steps(8, 256) == 3 * 13, "100 rows, the last of 13 steps with four"
    assert job.steps(8, 256, rows=8) == 3
    assert JobLimits(epochs=3).steps(8, 256) is None
    time = JobTime.of(step(), 1800, job)
    assert (time.seconds, time.cost, time.too_much) == (3600, 0.5, None)


@pytest.mark.parametrize(
    ("changes", "too_much"),
    [
        ({"max_hours": 1.0}, None),
        ({"max_hours": 0.9}, "takes 60 min, more than 0.9 h"),
        ({"max_price": 0.5}, None),
        ({"max_price": 0.4}, "costs 0.50, more than 0.4"),
    ],
)
def test_what_takes_or_costs_too_much_is_marked_by_the_longest_it_may_take(changes, too_much):
    job = JobLimits(price=0.5, **changes)
    assert JobTime.of(step(), 1800, job).too_much == too_much
    assert JobTime.of(step(low=1.0, high=2.0), 1800, job).too_much == too_much
    assert JobTime.of(step(low=0.5, high=1.0), 1800, job).too_much is None


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.0123, "12.3 ms"), (5.0, "5 s"), (90.0, "90 s"), (600.0, "10 min"), (10_800.0, "3 h")]
)
def test_lengths_of_time_are_said_as_people_say_them(seconds, words):
    assert step_time.span(seconds) == words


def test_kernels_of_other_dtypes_do_not_set_the_peak():
    mixed = Work({product(4096): 1, work.product("nt", "float32", 16, 16, 16, 4): 9}, 1)
    assert mixed.format == "bfloat16"
    assert Work({PASS: 3}, 1).format in ("", "float32")
