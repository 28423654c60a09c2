"""Does noise fail the gate, and does a slowdown? Hundreds of gates on real rounds: run it with `--false-alarms`.

Two children of the same method train in alternation, so the true speedup is known: 1, or less where real work was added
to every step of one of them. Each gate is one that `pytest experiments --benchmark-compare` would have made: pairs are
added until its verdict is clear or the cap is reached, and it is compared with a stored run that was measured likewise,
by other children. No pair of rounds is used twice, and every pair is written to
experiments/series/ with the verdict it led to, in a file named after the kind of device.
"""

import functools
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest
import torch

from lightweight import record
from lightweight.child import owner, worker
from lightweight.child.owner import Child
from lightweight.methods import BASELINE
from lightweight.models import OPT_TINY
from lightweight.plugin import PRECISION, Laboratory
from lightweight.session.alternation import log_ratio, share_cores, trial_of_rounds
from lightweight.training.meter import Meter
from lightweight.trial import Trial
from lightweight.verdict import ratio

SERIES = Path(__file__).parent / "series"

CPU_GATES_A_CHILD, CUDA_GATES_A_CHILD = 5, 100
"""What one process has of its own, such as where its memory lies, differs on a CPU; a GPU's context takes long."""
DEEP = {"num_hidden_layers": 4}
WIDE = {"hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 16, "num_hidden_layers": 2}
CPU_MODEL = replace(OPT_TINY, name="opt-deep", architecture={**(OPT_TINY.architecture or {}), **DEEP})
CUDA_MODEL = replace(OPT_TINY, name="opt-wide", architecture={**(OPT_TINY.architecture or {}), **WIDE})
"""Wide enough for a stock step to wait for the GPU: one of the twin itself waits for Python alone."""
CPU_METHOD = replace(BASELINE, training_arguments={"per_device_train_batch_size": 1})
CUDA_METHOD = BASELINE
CPU_LENGTH, CUDA_LENGTH = 64, 256
CPU_STEPS, CUDA_STEPS = 4, 1
"""Of a round: some 100 ms of a CPU's time, and some 35 ms of a GPU's."""
CPU_SIZE, GPU_SIZE = (64, 64), (1024, 1024)
"""Of the matrices of a planted product: a hundredth of a step at most, and on a GPU longer than its launch."""
WARM_UP = 6
"""Rounds before the first pair; a GPU's first steps take much longer than those that follow."""
BLOCK = 8
"""Pairs of now / stored's interval where its coverage is counted: those that every gate has."""


@pytest.fixture(autouse=True)
def asked_for(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--false-alarms") is None:
        pytest.skip("takes an hour; give --false-alarms")


@pytest.fixture
def count(request: pytest.FixtureRequest) -> int:
    """How many gates of the method against itself."""
    return int(request.config.getoption("--false-alarms"))


@pytest.fixture
def trial(laboratory: Laboratory) -> Trial:
    if laboratory.has_cuda:
        model, method, length, steps, gates = CUDA_MODEL, CUDA_METHOD, CUDA_LENGTH, CUDA_STEPS, CUDA_GATES_A_CHILD
    else:
        model, method, length, steps, gates = CPU_MODEL, CPU_METHOD, CPU_LENGTH, CPU_STEPS, CPU_GATES_A_CHILD
    return trial_of_rounds(laboratory.trial(model, method, max_length=length), gates * ratio.CAP + WARM_UP - 1, steps)


def test_noise_does_not_fail_the_gate(laboratory: Laboratory, trial: Trial, count: int) -> None:
    gates, stored = _gates("same", laboratory, trial, count=count, slowdown=0.0, fail=0.05)
    alarms = Counter(gate["verdict"] for gate in gates)
    assert alarms["fail"] <= count / 100
    first = [ratio.repeated_interval(gate["log_ratios"][:BLOCK], BLOCK, stored[gate["stored"]]) for gate in gates]
    covered = fmean(found.low <= 1 <= found.high for found in first)
    print(f"the interval after {BLOCK} pairs covers the truth in {covered:.1%} of {count}")
    assert covered >= 0.93  # what it covers beyond 95 % costs pairs, which the slowdowns below would miss


@pytest.mark.parametrize(("slowdown", "fail", "wanted"), [(0.10, 0.05, 0.95), (0.05, 0.03, 0.80)])
def test_a_slowdown_fails_the_gate(
    laboratory: Laboratory, trial: Trial, count: int, slowdown: float, fail: float, wanted: float
) -> None:
    name = f"slower-{slowdown * 100:.0f}"
    gates, _ = _gates(name, laboratory, trial, count=count // 2, slowdown=slowdown, fail=fail)
    found = math.expm1(-fmean(log for gate in gates for log in gate["log_ratios"]))
    print(f"planted: {slowdown:.0%} slower, measured: {found:.1%}")
    assert Counter(gate["verdict"] for gate in gates)["fail"] >= wanted * len(gates)
    assert found < slowdown * 1.15, f"{slowdown:.0%} were to be planted, and {found:.1%} were"


def test_the_harness_takes_less_than_a_hundredth_of_a_round(laboratory: Laboratory, trial: Trial) -> None:
    """What rounds of 100 ms take beside their steps: on the clock, or on a CPU, where other jobs delay what is on the
    clock, of the processor, by this process and the child."""
    step = _taken(laboratory, trial_of_rounds(trial, 50, 1))[1] / 50
    taken, steps = _taken(laboratory, trial_of_rounds(trial, 50, math.ceil(0.1 / step)))
    print(f"rounds of {steps / 50 * 1000:.0f} ms, of which the harness takes {1 - steps / taken:.2%}")
    assert 1 - steps / taken < 0.01


def _taken(laboratory: Laboratory, trial: Trial) -> tuple[float, float]:
    """The seconds that 50 rounds take, and those of their steps."""
    folder = laboratory.folder / f"share-{time.monotonic_ns()}"
    folder.mkdir()
    with owner.Child(trial, folder) as child:

        def now() -> tuple[float, float]:
            if trial.device_index is not None:
                return time.perf_counter(), sum(child.measured.step_seconds)
            ticks = (
                Path(f"/proc/{child.pids[0]}/stat").read_text().rpartition(")")[2].split()[11:13]
            )  # proc(5): utime, stime
            of_child = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
            return time.process_time() + of_child, child.measured.cpu_seconds

        child.round()
        began = now()
        for number in range(50):
            share_cores(child, pair=number)
            child.round()
        ended = now()
    return ended[0] - began[0], ended[1] - began[1]


def _gates(
    name: str,
    laboratory: Laboratory,
    trial: Trial,
    *,
    count: int,
    slowdown: float,
    fail: float,
) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """`count` gates, one after the other, written to the series called `name` as they come, and the stored runs that
    they are held against."""
    gates: list[dict[str, Any]] = []
    runs: list[list[float]] = []
    floor = 1 - fail
    at_once = CUDA_GATES_A_CHILD if laboratory.has_cuda else CPU_GATES_A_CHILD
    while len(gates) < count:
        stored = _stored(laboratory, trial)
        runs.append(_rounded(stored))
        with _children(laboratory, trial, slowdown) as pair:
            for _ in range(min(at_once, count - len(gates))):
                log_ratios: list[float] = []
                for look in ratio.looks(ratio.CAP):
                    log_ratios += [pair() for _ in range(look - len(log_ratios))]
                    verdict = ratio.verdict(ratio.repeated_interval(log_ratios, ratio.CAP, stored), floor)
                    if verdict != "undecided":
                        break
                gates.append({"verdict": verdict, "stored": len(runs) - 1, "log_ratios": _rounded(log_ratios)})
                print(f"{name}: gate {len(gates)}: {verdict} after {len(log_ratios)} pairs", flush=True)
                _write(name, laboratory, runs, gates)
    return gates, runs


def _stored(laboratory: Laboratory, trial: Trial) -> list[float]:
    """The stored run, the same method against itself: pairs until it is as precise as the plugin wants it."""
    log_ratios: list[float] = []
    with _children(laboratory, trial, 0.0) as pair:
        for look in ratio.looks(ratio.CAP):
            log_ratios += [pair() for _ in range(look - len(log_ratios))]
            if ratio.interval(log_ratios).half_width <= PRECISION:
                break
    return log_ratios


def _rounded(log_ratios: list[float]) -> list[float]:
    return [round(log, 5) for log in log_ratios]


@contextmanager
def _children(laboratory: Laboratory, trial: Trial, slowdown: float) -> Iterator[Callable[[], float]]:
    """Two live children of `trial`, the second `slowdown` slower; gives what adds one pair."""
    count = 0

    def pair() -> float:
        nonlocal count
        found = log_ratio(first, second, count)
        count += 1
        assert not math.isnan(found), (first.outcome, second.outcome)
        return found

    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        children = []
        for share in (0.0, slowdown):
            folder = laboratory.folder / f"false-alarms-{time.monotonic_ns()}"
            folder.mkdir()
            patch.setattr(worker, "run", functools.partial(run_slower, share))
            children.append(stack.enter_context(Child(trial, folder)))
        first, second = children
        for child in children * WARM_UP:
            child.round()
        yield pair


def run_slower(
    share: float,
    connection: Connection,
    trial: Trial,
    folder: Path,
    started: float,
    *others: Any,
) -> None:
    """In the child: `worker.run`, with matrix products added to every step for `share` of the step's own time: on a CPU
    until that is over, on a GPU as many as fit into it, by the last steps of warming up."""
    end_step, begin_round = Meter.end_step, Meter.begin_round
    began, products = 0.0, None
    on_gpu = trial.device_index is not None

    def begin_round_and_time_it(meter: Meter) -> None:
        nonlocal began, products
        begin_round(meter)
        if on_gpu and products is None and len(steps := meter.measurements().step_seconds) >= WARM_UP - 1:
            products = round(share * median(steps[-3:]) / _seconds_of_a_product())
        began = time.process_time()

    def end_step_later(meter: Meter) -> None:
        nonlocal began
        until = time.process_time() + share * (time.process_time() - began)
        factor = torch.ones(GPU_SIZE if on_gpu else CPU_SIZE, device=meter.device)
        for _ in range(products or 0):
            factor @ factor
        while not on_gpu and time.process_time() < until:
            factor @ factor
        end_step(meter)
        began = time.process_time()

    Meter.begin_round = begin_round_and_time_it  # type: ignore[assignment,method-assign]
    Meter.end_step = end_step_later  # type: ignore[assignment,method-assign]
    worker.run(connection, trial, folder, started, *others)


def _seconds_of_a_product() -> float:
    """Of the GPU, when it has enough of them waiting."""
    factor, count = torch.ones(GPU_SIZE, device="cuda"), 200
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    factor @ factor  # the first one has the library begin
    begin.record()
    for _ in range(count):
        factor @ factor
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / count


def _write(name: str, laboratory: Laboratory, stored: list[list[float]], gates: list[dict[str, Any]]) -> None:
    """One file a series: every pair's log ratio and the verdicts, from which the counts can be taken again."""
    SERIES.mkdir(exist_ok=True)
    document = {
        "device": laboratory.device.name,
        "versions": record.versions(),
        "cap": ratio.CAP,
        "load_average": os.getloadavg()[0],
        "steps_per_round": CUDA_STEPS if laboratory.has_cuda else CPU_STEPS,
        "stored": stored,
        "gates": gates,
    }
    kind = "gpu" if laboratory.has_cuda else "cpu"
    (SERIES / f"{name}-{kind}.json").write_text(json.dumps(document, indent=None) + "\n", "utf-8")
