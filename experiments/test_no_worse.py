"""Is the faster method no worse, on real weights, and what does fine-tuning make the model forget?

The English half of the corpus through the baseline, the adapters and their captured twins, several seeds each, a
seed's pairs in the same order for every method. Asserted is non-inferiority: the one-sided 95 % upper bound of the
held-out loss over the baseline's of the same seed is below a margin (lightweight/verdict/noninferiority.py says which
and why). Beside it stands the loss on plain English that is not from the corpus, before and after.

It runs where a model with real weights is named: `pytest experiments --model smollm2-135m`. With `--method` it is of
the methods that are named, with `--corpus` on the whole of that corpus; `--seeds`, `--margin` and the usual settings go
before those below. Before it begins it tells what so many seeds can show.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from lightweight import corpus, methods, record
from lightweight.corpus import Corpus
from lightweight.methods import BASELINE, BASELINE_CAPTURED, LORA, LORA_CAPTURED, QLORA, QLORA_CAPTURED, Method
from lightweight.plugin import NOT_RUN, Laboratory, Train
from lightweight.record import RecordError
from lightweight.session import options
from lightweight.settings import SweptRates, with_changed
from lightweight.trial import Completed
from lightweight.verdict import noninferiority, power

ELSEWHERE = Path(__file__).parent / "elsewhere.txt"
PILOT = Path(__file__).parent / "records" / "h200-no-worse.json"
"""Says how far losses scatter from seed to seed, where `--pilot` names no other record."""


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


@dataclass(frozen=True)
class Compared:
    """The differences of a method's held-out loss from the baseline's, one a seed, and what the baseline itself gained
    in training, on average; in nats a token."""

    differences: Sequence[float]
    gained: float


Compare = Callable[[Method], Compared]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The methods that `--method` names, else the suite's own."""
    if metafunc.function is test_no_worse_than_the_baseline:
        given = options.value(metafunc.config, "method")
        variants = [name for name in dict.fromkeys(given) if name != BASELINE.name] if given else NO_WORSE
        metafunc.parametrize("variant", variants, ids=lambda one: one if isinstance(one, str) else one.name)


@pytest.fixture
def examples(request: pytest.FixtureRequest, laboratory: Laboratory, model: str) -> Corpus:
    """What `model` is trained on, where that says something of quality. Before anything is there to be timed."""
    if not request.config.getoption("--model"):
        pytest.skip(f"{NOT_RUN}takes minutes; name a model with real weights, such as --model smollm2-135m")
    if laboratory.trial(model, BASELINE).model.weights != "pretrained":
        pytest.skip(f"{NOT_RUN}random weights say nothing about quality")
    try:
        return laboratory.corpus if laboratory.option("corpus") else corpus.in_latin_letters(laboratory.corpus)
    except corpus.CorpusError as error:
        pytest.skip(f"{NOT_RUN}{error}")


@pytest.fixture
def compare(examples: Corpus, train: Train, outcome_of: Train, laboratory: Laboratory, model: str) -> Compare:
    """Train a method with every seed, and the baseline."""
    settings = SETTINGS[laboratory.has_cuda]
    elsewhere = "\n\n".join(ELSEWHERE.read_text("utf-8").split("\n\n")[: settings.paragraphs])
    changes = {**_length(settings, laboratory), "corpus": replace(examples, elsewhere=elsewhere)}
    seeds = _seeds(laboratory)
    _tell_power(laboratory, len(seeds))

    # a rate is right for steps as they were when it was searched for
    keeps_steps = laboratory.settings.keeps_passes or isinstance(laboratory.settings.learning_rate, SweptRates)

    def sized(method: Method) -> Method:
        return method if keeps_steps else _in_steps_of(settings, method)

    def heldout_losses(how: Train, method: Method, seed: int) -> tuple[float, float]:
        outcome = how(model, sized(method), seed=seed, **changes)
        assert isinstance(outcome, Completed), f"{method.name}, seed {seed}: {outcome.reason}"
        before, after = outcome.measured.heldout_loss_before, outcome.measured.heldout_loss_after
        assert before is not None and after is not None
        return before, after

    def measure(method: Method) -> Compared:
        steps = [laboratory.trial(model, sized(one)).method.sequences_per_step for one in (method, BASELINE)]
        if steps[0] != steps[1]:
            pytest.skip(
                f"{NOT_RUN}{method.name} has {steps[0]} sequences an optimizer step and {BASELINE.name} {steps[1]}: "
                "give --batch-size and --accumulation with which both have as many"
            )
        first, *others = seeds  # the first is timed: pytest-benchmark stores no run in which nothing was
        losses = [heldout_losses(train, method, first), *(heldout_losses(outcome_of, method, seed) for seed in others)]
        baseline = [heldout_losses(outcome_of, BASELINE, seed) for seed in seeds]
        differences = [after - of_baseline for (_, after), (_, of_baseline) in zip(losses, baseline, strict=True)]
        return Compared(differences, gained=fmean(before - after for before, after in baseline))

    return measure


def test_no_worse_than_the_baseline(
    compare: Compare, laboratory: Laboratory, model: str, variant: str | Method
) -> None:
    method = methods.named(variant) if isinstance(variant, str) else variant
    is_ours = method is methods.METHODS.get(method.name)
    if is_ours and method.adapter is not None and laboratory.option("learning_rate") is None:
        rates = SETTINGS[laboratory.has_cuda].adapter_rates
        method = at_rate(method, rates[method.name.removesuffix("-captured")])
    margin = laboratory.option("margin")
    compared = compare(method)
    found = noninferiority.over_seeds(compared.differences)
    concluded = noninferiority.conclusion(found, margin)
    told = f"{model} x {method.name}: {concluded}: {found} nats over the baseline, the margin {margin:g}"
    if concluded == "inconclusive":
        told += f": {power.undecided(compared.differences, margin)}"
    if (too_wide := noninferiority.too_wide(margin, compared.gained)) is not None:
        told += f": {too_wide}"
    laboratory.progress.tell(told)
    assert concluded == "no worse", told


@pytest.mark.needs_cuda  # for the time it takes
@pytest.mark.parametrize("variant", OTHER_RATES, ids=lambda method: method.name)
def test_the_rates_are_fair_to_both_sides(
    compare: Compare, laboratory: Laboratory, model: str, variant: Method
) -> None:
    """At the originals' rate an adapter learns too little, which is why it has a larger one here; the baseline gains
    nothing to speak of by a larger one."""
    if laboratory.option("method"):
        pytest.skip(f"{NOT_RUN}methods were named, and these are the suite's own")
    found = noninferiority.over_seeds(compare(variant).differences)
    told = f"{model} x {variant.name}: {found} nats over the baseline"
    if variant.adapter is not None:
        assert noninferiority.conclusion(found) == "worse", told
    else:
        assert found.low > -noninferiority.MARGIN, told


def _seeds(laboratory: Laboratory) -> range:
    """Those of `--seeds`, else as many as the settings say."""
    return laboratory.seeds if laboratory.option("seeds") else SETTINGS[laboratory.has_cuda].seeds


def _length(settings: Settings, laboratory: Laboratory) -> dict[str, Any]:
    """How long is trained, in rows of how many tokens: as the command line says, else as the settings do."""
    changes = dict(settings.changes)
    if laboratory.option("epochs"):
        changes = {name: value for name, value in changes.items() if name not in ("epochs", "max_steps")}
    if "max_length" in laboratory.settings.rows:
        del changes["max_length"]
    return changes


def _tell_power(laboratory: Laboratory, seeds: int) -> None:
    """What so many seeds can show, from the run of `--pilot` or from a committed one: the widest spread counts."""
    path = laboratory.option("pilot") or PILOT
    try:
        spreads = power.spreads(record.load(path).entries)
    except RecordError as error:
        if laboratory.option("pilot"):
            raise pytest.UsageError(f"--pilot: {error}") from None
        return
    if not spreads:
        pytest.skip(f"{NOT_RUN}--pilot {path}: holds no method and baseline with the same two seeds on real weights")
    widest = max(spreads, key=lambda spread: spread.bound)
    laboratory.progress.tell(f"{power.planned(widest, seeds, laboratory.option('margin'))} (from {path.name})")


def _in_steps_of(settings: Settings, method: Method) -> Method:
    """`method` with as many sequences an optimizer step as all have."""
    return with_changed(method, {"batch_size": settings.sequences, "accumulation": 1})
