"""The method of a job that was given none."""

from dataclasses import replace
from pathlib import Path

import pytest
import samples

from conftest import MICRO
from lightweight import methods, models, targets
from lightweight.cli import choice
from lightweight.cli.job import Job, NothingFitsError
from lightweight.cli.output import Interrupted
from lightweight.corpus import Conversation, Corpus, Message
from lightweight.forecast.plan_row import PlanOptions, PlanRow
from lightweight.methods import CapturedStep, Method
from lightweight.settings import Settings
from lightweight.training import ranks
from lightweight.trial import Forecast

pytestmark = pytest.mark.usefixtures("without_gpu")


def test_on_several_ranks_methods_are_forecast_for_as_many(base, monkeypatch):
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    wanted = Job(
        model=str(base), corpus=Path("any"), output=Path("any"), settings=Settings(batch_size=2, max_length=64)
    )
    model, _ = models.find(models.named(str(base)), None)
    target, device = targets.named("16GiB"), targets.Device(name="cpu")
    (row,) = choice._forecasts(wanted, model, target, device, ("lora", "qlora"), lambda text: None)
    assert (row.method.name, row.question.gpus, row.batch_size, row.verdict) == ("baseline", 2, 1, "fits")


def test_a_jobs_methods_are_forecast_over_the_rows_of_its_corpus(micro):
    talks = tuple(Conversation((Message("user", f"a{n}"), Message("assistant", f"b{n}"))) for n in range(20))
    read = Corpus(talks, talks[:1], digest="")
    wanted = Job(model="micro", corpus=Path("any"), output=Path("any"), settings=Settings(max_length=256))
    target, device = targets.named("16GiB"), targets.Device(name="cpu")
    of_rows, of_length = (
        choice._forecasts(wanted, micro, target, device, ("lora", "qlora"), lambda text: None, *corpus)[0]
        for corpus in ((read,), ())
    )
    assert of_rows.corpus_rows is not None and of_rows.corpus_rows.longest < 40
    assert of_rows.forecast is not None and of_length.forecast is not None
    for cause in ("activations", "logits"):
        assert 0 < of_rows.forecast.by_cause[cause] < of_length.forecast.by_cause[cause] / 2


def chosen(monkeypatch, before, *rows, world_size=1):
    monkeypatch.setattr(ranks, "world_size", lambda: world_size)
    monkeypatch.setattr(choice, "_forecasts", lambda *_: list(rows))
    wanted = Job(model="micro", corpus=Path("any"), output=Path("any"))
    return choice.choose(wanted, MICRO, targets.T4, targets.Device(name="cpu"), before, lambda text: None).method


def row(method: Method, forecast: Forecast | None, **changes) -> PlanRow:
    return PlanRow(
        model="micro", method=method, target=targets.T4, question=PlanOptions(), forecast=forecast, **changes
    )


def test_what_was_planned_is_what_is_trained(monkeypatch, capsys):
    planned = row(methods.LORA.with_passes(4), samples.predicted(), chosen=True)
    assert chosen(monkeypatch, None, planned) == methods.LORA.with_passes(4)
    assert "method lora in 4 passes of 2 rows a step: 1.00 GiB of t4's 14.16 GiB" in capsys.readouterr().out
    assert chosen(monkeypatch, None, replace(planned, method=methods.LORA)) == methods.LORA


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("passes", [1, 2, 4, 8])
def test_what_was_planned_is_what_goes_on(monkeypatch, passes, world_size):
    planned = methods.LORA.with_passes(passes)
    settings = {"method": "lora", "training_arguments": dict(planned.on_rank(world_size).training_arguments)}
    resumed = chosen(monkeypatch, Interrupted(place=Path("any"), settings=settings), world_size=world_size)
    assert resumed.on_rank(world_size) == planned.on_rank(world_size)


def test_on_a_gpu_the_captured_step_is_taken_where_it_fits_and_said_and_on_a_cpu_it_is_no_candidate(capsys):
    wanted = Job(model="micro", corpus=Path("any"), output=Path("any"), settings=Settings(max_length=16))
    gpu = targets.Device(name="a card", total_bytes=16 * 2**30, capability=targets.HOPPER)
    taken = choice.choose(wanted, MICRO, targets.NATIVE, gpu, None, lambda text: None).method
    assert taken == replace(methods.LORA_CAPTURED, step=CapturedStep(compile=False)), "as it was forecast"
    line = capsys.readouterr().out
    assert line.startswith("method lora-captured: ")
    assert "(baseline, lora, qlora, lora-captured, qlora-captured)" in line
    assert "if they agree with the Trainer's (--method lora trains without capturing)" in line
    tried = choice._forecasts(wanted, MICRO, targets.T4, targets.Device(name="cpu"), ("qlora",), lambda text: None)
    assert [row.method.name for row in tried] == ["baseline", "lora"]


def test_what_is_set_of_a_captured_method_is_no_word_against_it(monkeypatch):
    """It is the suite's own, also where its step is not compiled, as it was forecast."""
    set_so = Settings(lora_alpha=16, batch_size=4, learning_rate=1e-3)
    planned = row(set_so.apply(methods.LORA_CAPTURED), samples.predicted(), chosen=True)
    monkeypatch.setattr(choice, "_forecasts", lambda *_: [planned])
    wanted = Job(model="micro", corpus=Path("any"), output=Path("any"), settings=set_so)
    gpu = targets.Device(name="a card", total_bytes=16 * 2**30, capability=targets.HOPPER)
    begun = Interrupted(place=Path("any"), settings={"method": "lora-captured", "training_arguments": {}})
    for before in (None, begun):
        taken = choice.choose(wanted, MICRO, targets.T4, gpu, before, lambda text: None).method
        assert (getattr(taken.adapter, "lora_alpha"), taken.sequences_per_pass) == (16, 4)  # noqa: B009
        assert taken.captured_step == CapturedStep(compile=False)


def test_a_captured_job_goes_on_as_it_was_begun(monkeypatch):
    planned = replace(methods.LORA_CAPTURED, step=CapturedStep(compile=False)).with_passes(2)
    settings = {"method": "lora-captured", "training_arguments": dict(planned.training_arguments)}
    assert chosen(monkeypatch, Interrupted(place=Path("any"), settings=settings)) == planned


def test_where_no_method_can_be_forecast_the_reason_is_told(monkeypatch):
    nothing = row(methods.LORA, None, reason="cannot be built: no")
    with pytest.raises(NothingFitsError, match="no method can be forecast: cannot be built: no: give --method"):
        chosen(monkeypatch, None, nothing)
    too_much = row(methods.BASELINE, samples.predicted("does_not_fit", 2**35))
    with pytest.raises(NothingFitsError, match=r"baseline takes least, 32\.00 GiB"):
        chosen(monkeypatch, None, nothing, too_much)
