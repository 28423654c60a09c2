import pytest
from samples import entry, paired, stopped

from lightweight.report import speed


def test_numbers_are_not_read_from_words():
    """A ratio is what was measured, not what two decimals of it are."""
    lora = entry(method="lora", steady_step_seconds=0.0333)
    found = speed.faster(lora, entry())
    assert found is not None and found.ratio == pytest.approx(0.1 / 0.0333, rel=1e-12)
    assert entry(peak_allocated_bytes=1).memory_share(entry(peak_allocated_bytes=3)) == 1 / 3
    assert speed.faster(stopped(), entry()) is None
    assert speed.faster(entry(), stopped()) is None
    found = speed.faster(entry(speedup=paired(1.23456, 1.1, 1.3)), None)
    assert found is not None and found.ratio == 1.23456


def test_pairs_of_an_old_record_that_were_measured_one_after_the_other_get_a_wider_interval():
    old = paired(1.649, 1.64, 1.65, pairing="one after the other")
    found = speed.faster(entry(method="lora", speedup=old), entry())
    assert found is not None and found.interval is not None
    low, high = found.interval
    assert low < 1.3 and high > 2.0
