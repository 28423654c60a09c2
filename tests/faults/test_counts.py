"""The table of counts keeps what did not run, and replaces what did."""

import pytest

from faults.conftest import BEGIN, END, with_rows


def test_a_class_that_ran_replaces_its_row_and_the_others_stay():
    text = with_rows(f"a\n{BEGIN}\n{END}\nb\n", {"x": ("x", "3", "2", "c0", "d0"), "y": ("y", "1", "1", "c0", "d0")})
    text = with_rows(text, {"y": ("y", "9", "9", "c1", "d1"), "a, new": ("a, new", "1", "0", "c1", "d1")})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert rows[2:] == [["a, new", "1", "0", "c1", "d1"], ["x", "3", "2", "c0", "d0"], ["y", "9", "9", "c1", "d1"]]
    assert text.startswith(f"a\n{BEGIN}\n") and text.endswith(f"{END}\nb\n")
    with pytest.raises(pytest.UsageError, match="has no"):
        with_rows("nothing", {})
