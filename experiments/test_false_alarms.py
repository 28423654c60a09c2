"""Does noise fail the gate, and does a slowdown? Hundreds of gates on real rounds: run it with `--false-alarms`.

Two children of the same method train in alternation, so the true speedup is known: 1, or less where real work was added
to every step of one of them. Each gate is one that `pytest experiments --benchmark-compare` would have made: pairs are
added until its verdict is clear or the cap is reached, and it is compared with a stored run that was measured likewise.
Children live for some twenty gates, no pair of rounds is used twice, and every pair is written to
experiments/series/ with the verdict it led to.
"""

import functools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from lightweight import isolation, ratio, record, worker
from lightweight.alternate import log_ratio, method_goes_first, seconds_per_token, share_cores, trial_of_rounds
from lightweight.isolation import Child
from lightweight.meter import Meter
from lightweight.methods import BASELINE
from lightweight.plugin import Laboratory
from lightweight.trial import Trial

SERIES = Path(__file__).parent / "series"

GATES_A_CHILD = 20
MODEL = "opt-tiny"
METHOD = replace(BASELINE, training_arguments={"per_device_train_batch_size": 4})  # rounds of about 100 ms on a CPU
BLOCK = 8
"""Pairs of one interval, where its coverage is counted."""


@pytest.fixture(autouse=True)
def asked_for(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--false-alarms"):
        pytest.skip("takes an hour; give --false-alarms")


@pytest.fixture
def trial(laboratory: Laboratory) -> Trial:
    steps = 8 if laboratory.has_cuda else 1
    return trial_of_rounds(laboratory.trial(MODEL, METHOD), 2 * GATES_A_CHILD * ratio.CAP, steps)


@pytest.fixture
def stored(laboratory: Laboratory, trial: Trial) -> tuple[float, ...]:
    """The stored run: the same method against itself, up to the cap."""
    with _children(laboratory, trial, 0.0) as pair:
        return tuple(pair() for _ in range(ratio.CAP))


def test_noise_does_not_fail_the_gate(laboratory: Laboratory, trial: Trial, stored: tuple[float, ...]) -> None:
    gates = _gates("same", laboratory, trial, stored, count=200, slowdown=0.0, fail=0.05)
    alarms = Counter(gate["verdict"] for gate in gates)
    assert alarms["fail"] <= 2
    series = [log for gate in gates for log in gate["log_ratios"]]
    blocks = [series[start : start + BLOCK] for start in range(0, len(series) - BLOCK + 1, BLOCK)]
    covered = sum(found.low <= 1 <= found.high for found in map(ratio.interval, blocks)) / len(blocks)
    assert 0.93 <= covered <= 0.97, f"the interval of {BLOCK} pairs covers the truth in {covered:.1%} of {len(blocks)}"


@pytest.mark.parametrize(("slowdown", "fail", "wanted"), [(0.10, 0.05, 95), (0.05, 0.03, 80)])
def test_a_slowdown_fails_the_gate(
    laboratory: Laboratory, trial: Trial, stored: tuple[float, ...], slowdown: float, fail: float, wanted: int
) -> None:
    name = f"slower-{slowdown * 100:.0f}"
    gates = _gates(name, laboratory, trial, stored, count=100, slowdown=slowdown, fail=fail)
    assert Counter(gate["verdict"] for gate in gates)["fail"] >= wanted


def test_the_harness_takes_less_than_a_hundredth_of_a_round(laboratory: Laboratory, trial: Trial) -> None:
    folder = laboratory.folder / "share"
    folder.mkdir()
    with isolation.Child(trial, folder) as child:
        child.round()
        shares = []
        for _ in range(50):
            began = time.perf_counter()
            seconds = seconds_per_token(child) * trial.tokens_per_step * trial.steps_per_epoch
            shares.append(1 - seconds / (time.perf_counter() - began))
    share = sorted(shares)[len(shares) // 2]
    print(f"rounds of {seconds * 1000:.0f} ms, of which the harness takes {share:.2%}")
    assert share < 0.01


def _gates(
    name: str,
    laboratory: Laboratory,
    trial: Trial,
    stored: tuple[float, ...],
    *,
    count: int,
    slowdown: float,
    fail: float,
) -> list[dict[str, Any]]:
    """`count` gates, one after the other, written to the series called `name` as they come."""
    gates: list[dict[str, Any]] = []
    floor = 1 - fail
    while len(gates) < count:
        with _children(laboratory, trial, slowdown) as pair:
            for _ in range(min(GATES_A_CHILD, count - len(gates))):
                log_ratios: list[float] = []
                for look in ratio.looks(ratio.CAP):
                    log_ratios += [pair() for _ in range(look - len(log_ratios))]
                    verdict = ratio.verdict(ratio.repeated_interval(log_ratios, ratio.CAP, stored), floor)
                    if verdict != "undecided":
                        break
                gates.append({"verdict": verdict, "log_ratios": [round(log, 6) for log in log_ratios]})
                print(f"{name}: gate {len(gates)}: {verdict} after {len(log_ratios)} pairs", flush=True)
                _write(name, laboratory, stored, gates)
    return gates


@contextmanager
def _children(laboratory: Laboratory, trial: Trial, slowdown: float) -> Iterator[Callable[[], float]]:
    """Two live children of `trial`, the second `slowdown` slower; gives what adds one pair."""
    count = 0

    def pair() -> float:
        nonlocal count
        found = log_ratio(first, second, method_first=method_goes_first(count))
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
        share_cores(first, second)
        for child in children:
            child.round()
            child.round()
        yield pair


def run_slower(
    share: float,
    connection: Connection,
    trial: Trial,
    folder: Path,
    started: float,
) -> None:
    """In the child: `worker.run`, with matrix products added to every step for `share` of the step's own time."""
    end_step = Meter.end_step
    ended = time.perf_counter()

    def end_step_later(meter: Meter) -> None:
        nonlocal ended
        on_gpu = meter.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        began = meter._marks[-1]
        until = now + share * (now - (began if isinstance(began, float) else ended))
        factor = torch.ones(128, 128, device=meter.device)
        while time.perf_counter() < until:
            factor @ factor
            if on_gpu:
                torch.cuda.synchronize()
        end_step(meter)
        ended = time.perf_counter()

    Meter.end_step = end_step_later  # type: ignore[assignment,method-assign]
    worker.run(connection, trial, folder, started)


def _write(name: str, laboratory: Laboratory, stored: tuple[float, ...], gates: list[dict[str, Any]]) -> None:
    """One file a series: every pair's log ratio and the verdicts, from which the counts can be taken again."""
    SERIES.mkdir(exist_ok=True)
    document = {
        "device": laboratory.device.name,
        "versions": record.versions(),
        "cap": ratio.CAP,
        "stored": [round(log, 6) for log in stored],
        "gates": gates,
    }
    kind = "gpu" if laboratory.has_cuda else "cpu"
    (SERIES / f"{name}-{kind}.json").write_text(json.dumps(document, indent=None) + "\n", "utf-8")
