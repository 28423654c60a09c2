"""The trial that tests of training change, and how a method trains."""

from typing import Any

import pytest
import torch

from lightweight import targets
from lightweight.child import worker
from lightweight.cli.train import Unattended
from lightweight.methods import BASELINE
from lightweight.training.meter import Meter
from lightweight.trial import Trial


@pytest.fixture
def trial(micro, small_corpus):
    return Trial(model=micro, method=BASELINE, target=targets.CPU, corpus=small_corpus, epochs=2)


@pytest.fixture(scope="module")
def trained(micro, small_corpus, tmp_path_factory):
    """Trains by a method, as a child does: what was measured."""
    known: dict[str, Any] = {}

    def train(method):
        trial = Trial(model=micro, method=method, target=targets.CPU, corpus=small_corpus, epochs=2)
        device = torch.device("cpu")
        meter, owner = Meter(device, 0.0), Unattended()
        prepared = worker.set_up(trial, device, meter, owner, tmp_path_factory.mktemp("trial"))
        worker.train(*prepared[:3], prepared.heldout, meter, lambda phase: None)
        worker.evaluate(prepared.trainer, prepared.heldout, meter)
        return meter.measurements()

    def once(method=BASELINE):
        if method.name not in known:
            known[method.name] = train(method)
        return known[method.name]

    return once
