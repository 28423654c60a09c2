"""The replay of traces worked by hand."""

import pytest

from lightweight.forecast.replay import MARGIN, Trace, within
from lightweight.targets import MiB


def handmade(*events):
    """A trace with a build phase of one weight, and then `events` of forward and backward."""
    forward, backward = events
    numbered = [(0, 40 * MiB), *forward, *backward]
    return Trace(
        parameters=1,
        trainable_parameters=1,
        events=numbered,
        causes=dict.fromkeys({name for name, _ in numbered}, "activations") | {0: "weights"},  # type: ignore[arg-type]
        phases=[(0, "build"), (1, "forward"), (1 + len(forward), "backward")],
    )


def test_a_replay_says_what_was_held_at_the_peak_and_in_which_phase():
    peak = handmade([(1, 30 * MiB), (2, 20 * MiB), (2, 0)], [(1, 0), (3, 20 * MiB)]).replay()
    assert (peak.allocated_bytes, peak.phase) == (90 * MiB, "forward")
    assert peak.by_cause["weights"] == 40 * MiB
    assert peak.by_cause["activations"] == 50 * MiB
    assert peak.out_of_memory_in is None


@pytest.mark.parametrize(
    ("budget", "phase"), [(30, "build"), (60, "forward"), (89, "forward"), (109, "backward"), (110, None)]
)
def test_a_replay_runs_out_of_memory_where_its_budget_ends(budget, phase):
    traced = handmade([(1, 30 * MiB), (2, 20 * MiB)], [(3, 20 * MiB)])
    assert traced.replay(budget * MiB).out_of_memory_in == phase


def test_a_verdict_needs_a_margin():
    traced = handmade([(1, 60 * MiB)], [(1, 0)])
    need = 100 * MiB
    assert within(traced, round(need / (1 - MARGIN)) + MiB).verdict == "fits"
    assert within(traced, round(need * 1.01)).verdict == "too_close_to_call"
    assert within(traced, round(need * 0.99)).verdict == "too_close_to_call"
    refused = within(traced, round(need / (1 + MARGIN)) - MiB)
    assert (refused.verdict, refused.phase, refused.reserved_bytes) == ("does_not_fit", "forward", need)
    assert within(traced, None).verdict == "fits"


def test_what_a_graph_has_reserved_stays_reserved():
    traced = Trace(
        parameters=1,
        trainable_parameters=1,
        events=[(0, 40 * MiB), (0, 0), (1, 50 * MiB), (1, 0), (2, 10 * MiB)],
        causes=dict.fromkeys(range(3), "activations"),
        streams={0: 1},
        emptied=[2, 4],
    )
    assert traced.replay().reserved_bytes == 50 * MiB
    traced.kept = frozenset({1})
    assert traced.replay().reserved_bytes == 90 * MiB
