"""How fast does the host launch the operators of a stock step? Timed where a step waits for nothing else.

The Trainer trains a network so small that its kernels end before the next is asked for, in a child as any trial. The
seconds of a step over the operators of its trace are the host's pace.
"""

from __future__ import annotations

import json
from pathlib import Path

from lightweight import corpus, models
from lightweight.child import owner, reaper
from lightweight.corpus import Corpus
from lightweight.forecast import tracer
from lightweight.forecast.calibration import CalibrationError
from lightweight.methods import BASELINE, LORA, QLORA, Method
from lightweight.models import Model
from lightweight.targets import HOPPER, NATIVE
from lightweight.trial import Completed, Measurements, Trial

SMALL = Model(
    name="small",
    architecture={
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "vocab_size": 384,
        "max_position_embeddings": 256,
    },
)
STEPS = 24
LENGTH = 64


def operator_seconds() -> dict[str, float]:
    """The seconds from one operator to the next, of each kind of stock step. Raises CalibrationError."""
    with reaper.own.temporary_folder() as folder:
        model = models.write(models.find(SMALL)[0], folder / "model", 0)
        turns = [
            {"role": role, "content": f"What is said for the {index}th time, which fills a row"}
            for index in range(20)
            for role in ("user", "therapist")
        ]
        (folder / "corpus.json").write_text(json.dumps(turns), "utf-8")
        said = corpus.load(folder / "corpus.json")
        return {method.name: _pace(model, method, said, folder) for method in (BASELINE, LORA, QLORA)}


def _pace(model: Model, method: Method, said: Corpus, folder: Path) -> float:
    trial = Trial(
        model=model,
        method=method,
        target=NATIVE,
        corpus=said,
        max_steps=STEPS,
        max_length=LENGTH,
        device_index=0,
    )
    with owner.Child(trial, folder) as child:
        for _ in range(trial.rounds):
            child.round()
        outcome = child.finish()
    if not isinstance(outcome, Completed):
        raise CalibrationError(f"the host's pace: {method.name} of a small model {outcome.kind}: {outcome.reason}")
    return _steady(outcome.measured) / tracer.trace(trial, HOPPER).work.operators


def _steady(measured: Measurements) -> float:
    """The median step, without the first, which warms up."""
    return sorted(measured.step_seconds[4:])[len(measured.step_seconds[4:]) // 2]
