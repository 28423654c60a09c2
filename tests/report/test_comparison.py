from verdict.test_gate import cell, compare, speedup

from lightweight.report import comparison


def test_the_text_shows_each_ratio_now_and_stored_and_losses():
    now = [cell("baseline"), cell(speedup=speedup(1.6), peak_allocated_bytes=2 * 2**30, heldout_loss_after=2.4)]
    then = [cell("baseline"), cell(speedup=speedup(1.7), peak_allocated_bytes=3 * 2**30)]
    text = comparison.text(compare(now, then))
    row = next(line for line in text.splitlines() if " lora " in line)
    for shown in ("1.60x [", "1.70x [", "0.94", "0.50", "0.75", "3.000 -> 2.400", "3.000 -> 2.500", "FAIL"):
        assert shown in row
    assert "Stored: 0001_old.json." in text
    assert text.splitlines()[-1].startswith("FAILED opt-350m x lora: ")
