"""Is the faster method no worse, on real weights, and what does fine-tuning make the model forget?

The English half of the corpus through the baseline, the adapters and their captured twins, several seeds each, a
seed's pairs in the same order for every method. Asserted is non-inferiority: the one-sided 95 % upper bound of the
held-out loss over the baseline's of the same seed is below a margin (lightweight/verdict/noninferiority.py says which
and why). Beside it stands the loss on plain English that is not from the corpus, before and after.

It runs where a model with real weights is named: `pytest experiments --model smollm2-135m`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from lightweight import corpus
from lightweight.methods import BASELINE, BASELINE_CAPTURED, LORA, LORA_CAPTURED, QLORA, QLORA_CAPTURED, Method
from lightweight.plugin import NOT_RUN, Laboratory, Train
from lightweight.trial import Completed
from lightweight.verdict import noninferiority

ELSEWHERE = Path(__file__).parent / "elsewhere.txt"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is trained: which seeds, how many sequences an optimizer step, in one pass, at which learning rate the
    adapters by method, changes of the Trial, and over how many paragraphs from elsewhere the loss is taken."""

    seeds: range
    sequences: int
    paragraphs: int
    adapter_rates: dict[str, float]
    changes: dict[str, Any]


# has_cuda -> as much of the original job as takes some three minutes on a fast GPU, and some nine on two CPU cores. The
# originals trained at the Trainer's 5e-5, at which an adapter, which begins at nothing, hardly moves; the fewer the
# steps, the larger they must be, and the fewer layers they are on. The rates come from a sweep on pairs held out of the
# training half (CHANGELOG.md).
# qlora accumulates nothing: its gradient is the same, and each of its passes takes a GPU some 0.3 s and a CPU more.
SETTINGS = {
    True: Settings(
        seeds=range(3),
        sequences=8,
        paragraphs=4,
        adapter_rates={"lora": 2e-3, "qlora": 1e-3},
        changes={"epochs": 3, "max_length": 160},
    ),
    False: Settings(
        seeds=range(3),
        sequences=2,
        paragraphs=2,
        adapter_rates={"lora": 3e-3, "qlora": 3e-3},
        changes={"max_steps": 5, "max_length": 104},
    ),
}


def at_rate(method: Method, learning_rate: float) -> Method:
    """`method` with another learning rate than the Trainer's, which its name says."""
    return replace(method.with_learning_rate(learning_rate), name=f"{method.name}-lr{learning_rate:g}")


NO_WORSE = (BASELINE_CAPTURED, LORA, QLORA, LORA_CAPTURED, QLORA_CAPTURED)
OTHER_RATES = (LORA_CAPTURED, at_rate(BASELINE_CAPTURED, 2e-4))  # captured, since they take seconds

Difference = Callable[[Method], noninferiority.Estimate]


@pytest.fixture
def difference(
    request: pytest.FixtureRequest, train: Train, outcome_of: Train, laboratory: Laboratory, model: str
) -> Difference:
    """Train a method with every seed: its held-out loss over the baseline's, in nats a token."""
    if not request.config.getoption("--model"):
        pytest.skip(f"{NOT_RUN}takes minutes; name a model with real weights, such as --model smollm2-135m")
    if laboratory.trial(model, BASELINE).model.weights != "pretrained":
        pytest.skip(f"{NOT_RUN}random weights say nothing of quality")
    try:
        english = corpus.in_latin_letters(laboratory.corpus)
    except corpus.CorpusError as error:
        pytest.skip(f"{NOT_RUN}{error}")
    settings = SETTINGS[laboratory.has_cuda]
    elsewhere = "\n\n".join(ELSEWHERE.read_text("utf-8").split("\n\n")[: settings.paragraphs])
    changes = {**settings.changes, "corpus": replace(english, elsewhere=elsewhere)}

    def heldout_loss(how: Train, method: Method, seed: int) -> float:
        outcome = how(model, _in_steps_of(settings, method), seed=seed, **changes)
        assert isinstance(outcome, Completed), f"{method.name}, seed {seed}: {outcome.reason}"
        loss = outcome.measured.heldout_loss_after
        assert loss is not None
        return loss

    def measure(method: Method) -> noninferiority.Estimate:
        first, *others = settings.seeds  # the first is timed: pytest-benchmark stores no run in which nothing was
        losses = [heldout_loss(train, method, first), *(heldout_loss(outcome_of, method, seed) for seed in others)]
        baseline = [heldout_loss(outcome_of, BASELINE, seed) for seed in settings.seeds]
        return noninferiority.over_seeds([loss - of for loss, of in zip(losses, baseline, strict=True)])

    return measure


@pytest.mark.parametrize("variant", NO_WORSE, ids=lambda method: method.name)
def test_no_worse_than_the_baseline(
    difference: Difference, laboratory: Laboratory, model: str, variant: Method
) -> None:
    if variant.adapter is not None:
        rates = SETTINGS[laboratory.has_cuda].adapter_rates
        variant = at_rate(variant, rates[variant.name.removesuffix("-captured")])
    found = difference(variant)
    assert noninferiority.conclusion(found) == "no worse", f"{model} x {variant.name}: {found} nats over the baseline"


@pytest.mark.needs_cuda  # for the time it takes
@pytest.mark.parametrize("variant", OTHER_RATES, ids=lambda method: method.name)
def test_the_rates_are_fair_to_both_sides(difference: Difference, model: str, variant: Method) -> None:
    """At the originals' rate an adapter learns too little, which is why it has a larger one here; the baseline gains
    nothing to speak of by a larger one."""
    found = difference(variant)
    told = f"{model} x {variant.name}: {found} nats over the baseline"
    if variant.adapter is not None:
        assert noninferiority.conclusion(found) == "worse", told
    else:
        assert found.low > -noninferiority.MARGIN, told


def _in_steps_of(settings: Settings, method: Method) -> Method:
    """`method` with as many sequences an optimizer step as all have."""
    sizes = {"per_device_train_batch_size": settings.sequences, "gradient_accumulation_steps": 1}
    return replace(method, training_arguments={**method.training_arguments, **sizes})
