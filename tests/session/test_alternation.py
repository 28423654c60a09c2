import math
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from typing import Any

import pytest

from lightweight import methods, targets
from lightweight.child import owner
from lightweight.session import alternation
from lightweight.session.alternation import trial_of_rounds
from lightweight.trial import Completed, Crashed, Measurements, OutOfMemory, Trial
from lightweight.verdict import ratio


@pytest.fixture
def trial(micro, small_corpus):
    return Trial(model=micro, method=methods.BASELINE, target=targets.CPU, corpus=small_corpus, epochs=3)


class FakeChild:
    """A child whose rounds take the processor the seconds it is given, and the clock twice as long, one step each; then
    it ends as it is told."""

    def __init__(self, trial, seconds, ends, log):
        self.trial, self.seconds, self.ends, self.log = trial, iter(seconds), ends, log
        self.measured, self.outcome = Measurements(), None
        self.pids, self.is_slow_for, self.silence_seconds = [os.getpid()], 0, 60.0
        *self.connections, self._end = Pipe()
        self._end.send("a round has ended")

    @property
    def has_answered(self):
        self.is_slow_for -= 1
        return self.is_slow_for < 0

    def round(self):
        self.log.append(self.trial.method.name)
        step = next(self.seconds, None)
        if step is None:
            self.outcome = self.ends
        else:
            had = self.measured
            clock = 2 * step if self.trial.device_index is None else step
            self.measured = Measurements(
                step_seconds=(*had.step_seconds, clock), cpu_seconds=had.cpu_seconds + (step if clock > step else 7.0)
            )

    def ask_for_round(self):
        self.log.append(f"ask {self.trial.method.name}")

    def await_round(self):
        self.round()


@pytest.fixture(autouse=True)
def cores():
    """Fake children have this process's id; what they pin is given back."""
    had = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, had)


@pytest.fixture
def start():
    """Starts fake children; `seconds` and `ends` by method name. `log` notes starts, rounds and ends."""

    def make(seconds, ends=None, alone=None):
        log, alive = [], []

        @contextmanager
        def start(trial):
            name = trial.method.name
            alive.append(name)
            log.append(f"start {name}")
            crowded = len(alive) > 1 or (ends or {}).get(name) is None
            end = (ends or {}).get(name) if crowded else (alone or {}).get(name)
            took = seconds[name] if end is None else []
            yield FakeChild(trial, took, end, log)
            alive.remove(name)
            log.append(f"end {name}")

        return start, log

    return make


def out_of_memory():
    return OutOfMemory(phase="forward", requested_bytes=1, budget_bytes=2, reason="no room", measured=Measurements())


def other(trial):
    return replace(trial, method=replace(methods.LORA, name="lora"))


def test_on_a_gpu_rounds_go_a_b_b_a_and_b_a_a_b_after_one_to_warm_up_each(trial, start):
    children, log = start({"baseline": [9.0] + [2.0] * 8, "lora": [9.0] + [1.0] * 8})
    trial = replace(trial, device_index=0)
    found = alternation.alternate(trial, other(trial), children, lambda pairs: True, cap=8)
    assert found.log_ratios == pytest.approx([math.log(2)] * 8)
    assert found.pairing == "alternating"
    assert found.ended is None
    rounds = [entry for entry in log if " " not in entry]
    assert rounds[:2] == ["baseline", "lora"]
    there, back = ["baseline", "lora", "lora", "baseline"], ["lora", "baseline", "baseline", "lora"]
    assert rounds[2:] == (there + back) * 2
    assert log[:2] == ["start baseline", "start lora"]


def test_when_one_is_done_something_else_takes_its_place_on_the_core(trial, monkeypatch):
    fast, slow = FakeChild(trial, [1.0], None, []), FakeChild(trial, [2.0], None, [])
    slow.is_slow_for, had = 5, os.sched_getaffinity(0)
    where, pinned = {os.getpid(): {1}, 0: had}, []
    monkeypatch.setattr(os, "sched_getaffinity", where.__getitem__)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: pinned.append((cores, alternation.NEIGHBOUR[0])))
    started = alternation.NEIGHBOUR[0]
    of_fast, of_slow = alternation.seconds_per_token(fast, slow)  # type: ignore[arg-type]
    assert of_slow == 2 * of_fast
    assert pinned == [({1}, started), (had, started + 5)]


def test_nothing_takes_its_place_for_longer_than_a_child_may_be_silent(trial):
    fast, silent = FakeChild(trial, [1.0], None, []), FakeChild(trial, [], "timed out", [])
    silent.is_slow_for, fast.silence_seconds, silent.silence_seconds = math.inf, 0.1, 0.1  # type: ignore[assignment]
    assert math.isnan(alternation.seconds_per_token(fast, silent)[1])  # type: ignore[arg-type]
    assert silent.outcome == "timed out"


@pytest.mark.parametrize(
    ("device_index", "pairs"),
    [(None, [[{0}, {1}], [{2}, {3}], [{4}, {5}], [{0}, {1}]]), (0, [[{0, 1}, {2, 3}], [{4, 5}, {0, 1}]])],
    ids=["cpu", "gpu"],
)
def test_like_ranks_share_cores_and_move_on_with_every_pair(trial, monkeypatch, device_index, pairs):
    pinned: dict[int, set[int]] = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(os, "sched_setaffinity", pinned.__setitem__)
    children: list[Any] = [FakeChild(replace(trial, device_index=device_index), [], None, []) for _ in range(2)]
    children[0].pids, children[1].pids = [11, 12], [21, 22]
    monkeypatch.setattr(alternation.Path, "iterdir", lambda folder: iter([folder / folder.parent.name]))
    for pair, (first, second) in enumerate(pairs):
        alternation.share_cores(*children, pair=pair)
        assert pinned == {11: first, 21: first, 12: second, 22: second}


def test_on_a_cpu_both_are_asked_at_once_and_what_the_processor_worked_is_compared(trial, start):
    children, log = start({"baseline": [9.0] + [1.5, 3.0] * 4, "lora": [9.0] + [1.0] * 8})
    found = alternation.alternate(trial, other(trial), children, lambda pairs: True, cap=8)
    assert found.log_ratios == pytest.approx([math.log(1.5), math.log(3)] * 4)
    assert found.pairing == "sharing a core"
    first, second = ["baseline", "lora"], ["lora", "baseline"]
    rounds = [entry for entry in log if not entry.startswith(("start", "end"))][2:]
    asked = [[f"ask {name}" for name in order] + order for order in (first, second, second, first) * 2]
    assert rounds == [entry for pair in asked for entry in pair]


def test_where_a_process_cannot_be_kept_on_a_core_they_take_turns(trial, start, monkeypatch):
    monkeypatch.setattr(alternation, "CAN_PIN", False)
    children, log = start({"baseline": [2.0] * 9, "lora": [1.0] * 9})
    found = alternation.alternate(trial, other(trial), children, lambda pairs: True, cap=8)
    assert found.pairing == "alternating"
    assert not any(entry.startswith("ask") for entry in log)


def test_the_core_that_is_shared_changes_every_pair(trial, start, monkeypatch):
    pinned = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 5})
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cores: pinned.append((thread, cores)))
    children, _ = start({"baseline": [2.0] * 20, "lora": [1.0] * 20})
    alternation.alternate(trial, other(trial), children, lambda pairs: False, cap=12)
    monkeypatch.undo()
    shared = [cores for thread, cores in pinned if thread == os.getpid()]  # both fake children are this process
    assert shared == [{2}, {2}, {5}, {5}] * 6


def test_pairs_are_added_at_the_looks_until_it_is_enough_or_the_cap(trial, start):
    for enough, pairs in ((8, 8), (99, 12)):
        children, _ = start({"baseline": [1.0] * 20, "lora": [1.0] * 20})
        asked: list[int] = []
        found = alternation.alternate(
            trial,
            other(trial),
            children,
            lambda p, asked=asked, e=enough: asked.append(len(p)) or len(p) >= e,  # type: ignore[misc]
            cap=12,
        )
        assert len(found.log_ratios) == pairs
        assert asked == [look for look in ratio.looks(12) if look <= pairs]


def test_the_ratio_is_per_token(trial, start):
    """Of padded rows where all have one length; its steps are full, as those of `trial_of_rounds`."""
    smaller = replace(methods.LORA, training_arguments={"per_device_train_batch_size": 4})
    children, _ = start({"baseline": [1.0] * 20, "lora": [1.0] * 20})
    full = trial.with_rows(40)
    found = alternation.alternate(full, replace(full, method=smaller), children, lambda pairs: True, cap=8)
    assert found.log_ratios == pytest.approx([-math.log(2)] * 8)


def test_where_batches_have_their_longest_rows_length_it_is_per_token_of_the_dialogues(trial, folder):
    with owner.Child(replace(trial, padding="longest", threads=1), folder) as child:
        (per_token,) = alternation.seconds_per_token(child)
        measured = child.measured
        assert sum(measured.step_tokens) < sum(measured.step_padded_tokens) < 20 * 256
        assert per_token == pytest.approx(measured.cpu_seconds / sum(measured.step_tokens))


def test_what_does_not_fit_side_by_side_runs_one_after_the_other(trial, start):
    children, log = start(
        {"baseline": [3.0] * 20, "lora": [1.0] * 20}, ends={"lora": out_of_memory()}, alone={"lora": None}
    )
    found = alternation.alternate(trial, other(trial), children, lambda pairs: True, cap=8)
    assert found.pairing == "one after the other"
    assert found.log_ratios == pytest.approx([math.log(3)] * 8)
    assert log.index("end baseline") < len(log) - 1 - log[::-1].index("start lora")


def test_what_does_not_fit_alone_either_has_no_ratio(trial, start):
    children, _ = start(
        {"baseline": [3.0] * 20, "lora": []}, ends={"lora": out_of_memory()}, alone={"lora": out_of_memory()}
    )
    found = alternation.alternate(trial, other(trial), children, lambda pairs: True, cap=8)
    assert found.log_ratios == ()
    assert found.ended is not None and isinstance(found.ended[1], OutOfMemory)
    assert found.ended[0].method.name == "lora"


def test_a_trial_that_ends_between_rounds_keeps_the_pairs_before_it(trial, start):
    crash = Crashed(phase="train", reason="gone", details="", measured=Measurements())
    children, _ = start({"baseline": [1.0] * 20, "lora": [1.0] * 4})
    ending = children

    @contextmanager
    def crashing(trial):
        with ending(trial) as child:
            child.ends = crash
            yield child

    found = alternation.alternate(trial, other(trial), crashing, lambda pairs: True, cap=8)
    assert len(found.log_ratios) == 3
    assert found.ended is not None and found.ended[1] is crash


def test_rounds_have_full_steps_whatever_the_corpus_holds(trial):
    short = trial_of_rounds(trial, rounds=10, steps=4)
    assert (short.steps_per_epoch, short.rounds, len(short.corpus.train)) == (4, 11, 32)
    assert short.corpus.digest == trial.corpus.digest
    assert short.threads == 1
    assert trial_of_rounds(replace(trial, device_index=0), rounds=10, steps=4).threads is None
    assert short.corpus.train[:20] == trial.corpus.train


@pytest.mark.parametrize(
    ("batch", "accumulation", "step"), [(8, 1, 8), (64, 1, 20), (128, 2, 20), (8, 8, 16), (2, 4, 8), (20, 1, 20)]
)
def test_a_round_has_no_more_in_a_step_than_the_trial_has_pairs(trial, batch, accumulation, step):
    """20 pairs: a batch of 64 is one of 20 in the trial, and so it is in its rounds."""
    arguments = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    method = replace(trial.method, training_arguments=arguments)
    short = trial_of_rounds(replace(trial, method=method), rounds=3, steps=2)
    assert short.method.sequences_per_step == step
    assert (short.steps_per_epoch, len(short.corpus.train)) == (2, 2 * step)
    assert short.tokens_per_step == step * short.max_length


def test_two_live_children_alternate(trial, tmp_path):
    """For real: the same method against itself, in two processes at once."""
    pids: list[int] = []
    affinities: list[set[int]] = []

    @contextmanager
    def start(trial):
        folder = tmp_path / str(len(pids))
        folder.mkdir()
        with owner.Child(trial, folder) as child:
            pids.extend(child.pids)
            yield child
            affinities.append(os.sched_getaffinity(child.pids[0]))
            assert not isinstance(child.outcome, Completed)  # it was closed before its time

    short = trial_of_rounds(trial, rounds=8, steps=2)
    found = alternation.alternate(short, short, start, lambda pairs: False, cap=8)
    assert len(found.log_ratios) == 8
    assert found.ended is None
    assert len(set(pids)) == 2
    assert affinities[0] == affinities[1] and len(affinities[0]) == 1
    assert 0.2 < ratio.interval(found.log_ratios).ratio < 5


def dead_pid() -> int:
    """Of a process that has ended, and whose end has been waited for."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


@pytest.mark.parametrize("who", ["baseline", "method", "both"])
def test_a_child_that_has_died_between_rounds_is_told_by_its_outcome(trial, who):
    """With the number of a process that is no more, where the system has nothing to keep on a core."""
    died = Crashed(phase="train", reason="killed by SIGKILL", details="", measured=Measurements())
    children: list[Any] = []
    for name in ("baseline", "method"):
        child = FakeChild(trial, [1.0] if name == who or who == "both" else [1.0] * 99, died, [])
        child.round()  # to warm up
        if name == who or who == "both":
            child.pids = [dead_pid()]
        children.append(child)
    assert math.isnan(alternation.log_ratio(children[0], children[1], 0))
    assert died in [child.outcome for child in children]


def test_a_thread_that_ends_before_it_is_put_on_a_core_costs_nothing(trial, monkeypatch):
    """Between being listed and being pinned; the threads after it are pinned all the same."""
    pinned: dict[int, set[int]] = {}

    def pin(thread: int, cores: set[int]) -> None:
        if thread == 11:
            raise ProcessLookupError
        pinned[thread] = cores

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(os, "sched_setaffinity", pin)
    monkeypatch.setattr(alternation, "_threads", lambda _: [11, 12])
    child: Any = FakeChild(trial, [], None, [])
    alternation.share_cores(child, pair=0)
    assert pinned == {12: {0}}


def test_a_real_child_killed_between_pairs_ends_them_with_its_outcome(trial, tmp_path):
    def start(part):
        folder = tmp_path / part.method.name
        folder.mkdir()
        return owner.Child(part, folder)

    other = replace(trial, method=replace(trial.method, name="other"))
    parts = [trial_of_rounds(part, 8, 1) for part in (trial, other)]
    with start(parts[0]) as first, start(parts[1]) as second:
        for child in (first, second):
            child.round()
        os.kill(second.pids[0], signal.SIGKILL)
        assert math.isnan(alternation.log_ratio(first, second, 0))
        assert isinstance(second.outcome, Crashed)
        assert second.outcome.reason.startswith("killed by SIGKILL")
