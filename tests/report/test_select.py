from pathlib import Path

from samples import LADDER, entry, run, stopped

from lightweight import record
from lightweight.report import select, tables

RECORDS = Path(__file__).parents[2] / "experiments" / "records"
RECORD = RECORDS / "h200-t4.json"


def test_the_committed_record_holds_the_answer():
    """The original's four runs, on a real GPU, under a T4's budget."""
    found = {(e.model, e.method): e for e in record.load(RECORD).entries if e.target == "t4"}
    assert found["opt-350m", "baseline"].outcome == "completed"
    assert found["opt-350m", "lora"].outcome == "completed"
    assert found["gpt-neo-1.3b", "baseline"].outcome == "out_of_memory"
    assert found["gpt-neo-1.3b", "qlora"].outcome == "completed"
    qlora = found["gpt-neo-1.3b", "qlora"]
    assert qlora.peak_reserved_bytes is not None and qlora.budget_bytes is not None
    assert qlora.peak_reserved_bytes <= qlora.budget_bytes
    forecast = {cell: e.forecast_verdict == "fits" for cell, e in found.items()}
    assert forecast == {cell: e.outcome == "completed" for cell, e in found.items()}
    assert all(e.device_bytes and e.steps in (0, 130) for e in found.values())


def test_no_cell_is_missing_from_the_tables():
    short = entry(model="opt-350m", method="fp32-check", planned_steps=1)
    capped = entry(method="lora", target="opt-350m x lora: too little")
    made = tables.tables([run(entry(), stopped(method="lora"), short, capped, *LADDER)])
    shown = [e for table in made if table.key in ("results", "others", "ladder-0") for e in table.entries]
    assert len(shown) == 8 == len({id(e) for e in shown})


def test_a_short_trial_is_told_where_it_is_the_control_of_one_that_ran_out_of_memory():
    told = select.main_cells(
        [stopped(), entry(target="native", planned_steps=1), entry(method="lora", planned_steps=1)]
    )
    assert [(e.method, e.target) for e in told] == [("baseline", "t4"), ("baseline", "native")]


def test_a_newer_run_replaces_an_older_one_whose_digests_nobody_knew():
    old = run(entry(method="lora", method_digest=None), ended="2026-01-01", name="old.json")
    new = run(entry(method="lora", method_digest="a" * 64), ended="2026-01-02", name="new.json")
    other = run(entry(method="lora", method_digest="b" * 64), ended="2026-01-03", name="other.json")
    assert [e.method_digest for e in select.newest([old, new])] == ["a" * 64]
    assert [e.method_digest for e in select.newest([new, other])] == ["a" * 64, "b" * 64]
    assert len(select.trend(new.entries[0], [old, new, other])) == 2


def test_old_records_say_ladders_and_peers_by_their_tests():
    for name, key in (("h100-ladder", "ladder-0"), ("h100-peers", "peers")):
        run_ = record.load(RECORDS / f"{name}.json")
        assert any(table.key == key for table in tables.tables([run_]))
        assert not select.main_cells(run_.entries)
