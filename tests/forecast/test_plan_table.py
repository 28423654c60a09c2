"""A plan as a person reads it."""

from dataclasses import replace

import samples

from lightweight import targets
from lightweight.forecast import plan_table
from lightweight.forecast.plan_row import PlanOptions, PlanRow
from lightweight.methods import BASELINE, LORA, LORA_CAPTURED
from lightweight.targets import MiB

ROW = PlanRow(model="m", method=LORA, target=targets.T4, question=PlanOptions(), forecast=samples.predicted())
ASKED = PlanOptions(gpus=2, max_batch=True, longest_row=True, fewest_gpus=True)


def line_of(row, *others):
    """The cells of a row's verdict."""
    (line,) = [
        line
        for line in plan_table.table([row, *others]).splitlines()
        if line.split()[:2] == [row.target.name, row.method.name]
    ]
    return line.split()


def test_the_device_that_the_order_comes_from_is_told():
    assert "measured on" not in plan_table.table([replace(ROW, chosen=True)])
    table = plan_table.table([replace(ROW, chosen=True, measured_on="NVIDIA H200")])
    assert "t4: the fastest by step times measured on NVIDIA H200." in table


def test_paged_state_has_a_column_of_its_own_where_there_is_any():
    assert "paged" not in plan_table.table([ROW])
    table = plan_table.table([replace(ROW, forecast=samples.predicted(paged_bytes=900 * MiB))])
    assert "paged" in table and "900 MiB" in table and "managed memory" in table


def test_what_was_asked_for_has_columns_and_what_was_not_has_none():
    table = plan_table.table([ROW])
    assert "largest batch" not in table and "fewest GPUs" not in table and "gathered" not in table
    assert "longest row" not in table
    row = replace(ROW, question=ASKED, max_batch=17, longest_row=4096, fewest_gpus=None)
    assert line_of(row)[-3:] == ["17", "4096", "none"]
    table = plan_table.table([row])
    assert "gathered" in table and "allocated at the peak on each of 2 GPUs" in table and "FSDP2" in table


def test_layers_that_are_computed_twice_are_told():
    method = LORA_CAPTURED.with_at_most(1).recomputing(3)
    table = plan_table.table([replace(ROW, method=method)])
    assert "1 x 1, 3 layers twice" in table
    assert "twice" not in plan_table.table([replace(ROW, method=LORA_CAPTURED)])


def test_a_verdict_has_the_phase_it_is_of_or_the_reason():
    assert line_of(replace(ROW, chosen=True))[5:9] == ["fits", "<-", "take", "this"]
    assert line_of(ROW)[-1] == "forward"
    too_much = replace(ROW, forecast=samples.predicted("does_not_fit", 2**35))
    assert line_of(too_much)[-5:] == ["out", "of", "memory", "in", "forward"]
    unknown = replace(ROW, method=BASELINE, forecast=None, reason="cannot be built")
    assert line_of(unknown, ROW)[-3:] == ["cannot", "be", "built"]
    assert "parameters" not in plan_table.table([unknown])
