"""The trial that tests of training change."""

import pytest

from lightweight import targets
from lightweight.methods import BASELINE
from lightweight.trial import Trial


@pytest.fixture
def trial(micro, small_corpus):
    return Trial(model=micro, method=BASELINE, target=targets.CPU, corpus=small_corpus, epochs=2)
