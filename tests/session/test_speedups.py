import pytest

from lightweight.session import speedups
from lightweight.verdict import limits


@pytest.mark.parametrize(
    ("ratio", "wanted"), [(1.0, 0.005), (1.05, 0.005), (1.2, 0.0091), (0.315, 0.025), (13.0, 0.025)]
)
def test_a_ratio_far_from_one_is_not_wanted_as_precisely(ratio, wanted):
    assert speedups.precision_wanted(ratio) == pytest.approx(wanted, rel=0.01)
    assert speedups.precision_wanted(1 / ratio) == pytest.approx(wanted, rel=0.01)
    assert wanted <= limits.FAIL / 2
