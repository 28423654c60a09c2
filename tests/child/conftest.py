"""A trial that takes a second, on the GPU where there is one."""

import pytest
import torch

from lightweight import targets
from lightweight.methods import BASELINE
from lightweight.trial import Trial


@pytest.fixture
def trial(micro, small_corpus):
    device_index = 0 if torch.cuda.is_available() else None
    target = targets.CPU if device_index is None else targets.NATIVE
    return Trial(model=micro, method=BASELINE, target=target, corpus=small_corpus, epochs=2, device_index=device_index)
