import json
from types import SimpleNamespace

import samples

from lightweight.session.ledger import Ledger, Shipment

CELL = samples.entry(test="t.py::test_cell", worker="gw0", visible_gpu="1")
OTHER = samples.entry(test="t.py::test_cell", seed=1)
MEASURED = samples.paired(1.5, 1.4, 1.6)


def report(found, when="call"):
    """A test's report as pytest-xdist carries it."""
    carried = json.loads(json.dumps(found.as_json()))
    return SimpleNamespace(lightweight=carried, nodeid="t.py::test_cell", when=when, skipped=False)


def test_what_crosses_between_processes_is_plain_json_and_comes_out_as_it_went_in():
    found = Shipment(entries=[CELL, samples.stopped()], forecasts=[samples.forecast()], speedups=[(CELL, MEASURED)])
    carried = Shipment.of_json(json.loads(json.dumps(found.as_json())))
    assert (carried.entries, carried.forecasts) == (found.entries, found.forecasts)
    ((trial, speedup),) = carried.speedups
    assert (trial.seed, speedup) == (CELL.seed, MEASURED)
    assert Shipment().as_json() == {} and Shipment.of_json({}) == Shipment()


def test_a_speedup_is_put_into_the_trial_it_is_of(pytestconfig):
    ledger = Ledger(pytestconfig)
    ledger.pytest_runtest_logreport(report(Shipment(entries=[CELL, OTHER])))
    ledger.pytest_runtest_logreport(report(Shipment(speedups=[(OTHER, MEASURED)])))
    assert [entry.speedup for entry in ledger.entries] == [None, MEASURED]


def test_of_a_test_that_is_run_again_the_last_time_counts(pytestconfig):
    ledger = Ledger(pytestconfig)
    ledger.pytest_runtest_logreport(report(Shipment(entries=[CELL])))
    ledger.pytest_runtest_logreport(report(Shipment(), when="setup"))
    ledger.pytest_runtest_logreport(report(Shipment(entries=[OTHER])))
    assert [entry.seed for entry in ledger.entries] == [1]
