"""The search for a rate: the same budget for every method, on examples that no comparison is judged by."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import turns
from lightweight import corpus, files, methods, record
from lightweight.__main__ import main
from lightweight.cli import sweep
from lightweight.methods import Method
from lightweight.preload import peft
from lightweight.settings import Settings, SweptRates

pytestmark = pytest.mark.usefixtures("without_gpu")


def searched(low, high, budget, loss_of):
    tried = sweep.rates(low, high, budget, loss_of)
    assert all(low <= one.rate <= high for one in tried)
    assert len({one.rate for one in tried}) == len(tried) == budget
    return tried


def best_rate(tried: list[sweep.Tried]) -> float:
    best = sweep.best(tried)
    assert best is not None
    return best.rate


def rate_of(entry: record.Entry) -> float:
    assert entry.training_arguments is not None
    return entry.training_arguments["learning_rate"]


@pytest.mark.parametrize("optimum", [2e-5, 3e-4, 7e-3])
def test_the_search_comes_near_the_optimum_and_nearer_with_a_larger_budget(optimum):
    def loss(rate):
        return math.log(rate / optimum) ** 2

    off = [abs(math.log(best_rate(searched(1e-5, 1e-2, budget, loss)) / optimum)) for budget in (6, 12, 20)]
    assert off[2] <= off[0]
    assert off[2] < math.log(1.25)


def test_the_grid_has_both_ends_and_equal_factors():
    first = [one.rate for one in searched(1e-5, 1e-2, 8, lambda rate: rate)][:4]
    assert first == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2])


def test_what_does_not_complete_is_no_best_and_the_search_goes_on_below_it():
    def loss(rate):
        return math.inf if rate > 1e-3 else -rate

    tried = searched(1e-5, 1e-1, 12, loss)
    assert 5e-4 < best_rate(tried) <= 1e-3
    assert sweep.best([sweep.Tried(1.0, math.inf)]) is None
    searched(1e-5, 1e-2, 8, lambda rate: math.inf)  # where nothing completes


def test_what_is_held_out_is_left_out_and_others_are_held_out_instead(small_corpus):
    halved = corpus.without_heldout(small_corpus, "it")
    assert set(halved.train) | set(halved.heldout) == set(small_corpus.train)
    assert halved.heldout and not set(halved.heldout) & set(halved.train)
    assert not set(small_corpus.heldout) & {*halved.train, *halved.heldout}
    assert halved.digest != small_corpus.digest
    with pytest.raises(corpus.CorpusError, match="1 example to train on"):
        corpus.without_heldout(replace(small_corpus, train=small_corpus.train[:1]), "it")


def test_a_sweep_is_recorded_and_its_rates_can_be_taken(micro, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.json").write_text(json.dumps(turns(24)), "utf-8")
    asked = ["sweep", "--model", micro.location, "--method", "baseline", "--method", "lora", "--budget", "3"]
    asked += ["--learning-rate", "1e-4..1e-2", "--max-steps", "2", "--max-length", "48", "--output", "found.json"]
    assert main(asked) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("baseline: 3 of 3 trials completed: ") and told[1].startswith("lora: 3 of 3 ")
    entries = record.load("found.json").entries
    tried = {name: [rate_of(of) for of in entries if of.method == name] for name in ("baseline", "lora")}
    assert tried["baseline"] == tried["lora"] == pytest.approx([1e-4, 1e-3, 1e-2])
    whole = corpus.load("corpus.json")
    assert {of.corpus_digest for of in entries} == {corpus.without_heldout(whole, "").digest}
    losses = {
        rate_of(of): of.heldout_loss_after
        for of in entries
        if of.method == "lora" and of.heldout_loss_after is not None
    }
    settings = Settings.read(lambda name: "found.json" if name == "learning_rate" else None)
    lora, baseline = settings.applied([methods.LORA, methods.BASELINE])
    best = min(losses, key=losses.__getitem__)
    assert lora.training_arguments["learning_rate"] == best == lora.changed["learning_rate"]
    assert isinstance(settings.learning_rate, SweptRates)
    assert set(settings.learning_rate.of) == {"baseline", "lora"} and baseline.changed
    assert main(["report", "found.json"]) == 0 and "--learning-rate 0.001" in capsys.readouterr().out
    record.check_searched(settings.learning_rate, micro.location, lora, baseline)
    with pytest.raises(ValueError, match=f"found.json: was searched on model {micro.location}, not on opt-tiny: sweep"):
        record.check_searched(settings.learning_rate, "opt-tiny", lora)
    assert main(["plan", "opt-tiny", "--method", "lora", "--learning-rate", "found.json"]) == 2
    assert "was searched on model" in capsys.readouterr().err
    job = ["train", "--model", "opt-tiny", "--weights", "random", "--method", "lora", "--output", "out"]
    assert main([*job, "--learning-rate", "found.json"]) == 2
    assert "was searched on model" in capsys.readouterr().err and not (tmp_path / "out").exists()
    adapter = lora.adapter
    assert isinstance(adapter, peft.LoraConfig)
    other = replace(lora, adapter=replace(adapter, r=16))
    with pytest.raises(ValueError, match=r"found\.json: method lora has changed since the sweep"):
        record.check_searched(settings.learning_rate, micro.location, other)
    with pytest.raises(
        methods.MethodError, match="has no rate for method qlora, only for baseline, lora: sweep it, too"
    ):
        settings.apply(methods.QLORA)
    mine = replace(methods.LORA, name="lora", training_arguments={"learning_rate": 0.5})
    assert settings.apply(mine).training_arguments["learning_rate"] == lora.training_arguments["learning_rate"]

    # an interrupted search goes on: what is there is not run again
    ran = []
    run = sweep._Search._run
    monkeypatch.setattr(sweep._Search, "_run", lambda self, trial: ran.append(trial.method.name) or run(self, trial))
    document = json.loads((tmp_path / "found.json").read_text("utf-8"))
    document["outcomes"].pop()
    document["outcomes"][1]["versions"]["torch"] = "1.0"
    (tmp_path / "found.json").write_text(json.dumps(document), "utf-8")
    assert main(asked) == 0
    assert ran == ["baseline", "lora"]
    again = record.load("found.json").entries
    assert [(of.method, rate_of(of), of.heldout_loss_after) for of in again] == [
        (of.method, rate_of(of), of.heldout_loss_after) for of in entries
    ]


def test_what_no_search_wrote_is_not_written_over(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.json").write_text(json.dumps(turns(24)), "utf-8")
    for text in ("thesis", json.dumps(record.document([]))):
        (tmp_path / "x.json").write_text(text, "utf-8")
        assert main(["sweep", "--model", "opt-tiny", "--method", "lora", "--output", "x.json"]) == 2
        assert "--output x.json: already exists, and no sweep wrote it: give another name" in capsys.readouterr().err
        assert (tmp_path / "x.json").read_text("utf-8") == text


def at_a_rate_of_its_own(network, arguments):
    return torch.optim.SGD(network.parameters(), lr=0.1)


FIXED = Method(name="fixed", optimizer=at_a_rate_of_its_own)


def test_a_method_without_a_rate_is_told_with_its_reason(micro, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.json").write_text(json.dumps(turns(24)), "utf-8")
    asked = [
        "sweep",
        "--model",
        micro.location,
        "--method",
        "cli.test_sweep:FIXED",
        "--budget",
        "3",
        "--max-steps",
        "1",
    ]
    assert main([*asked, "--max-length", "48", "--output", "found.json"]) == 1
    line, _ = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "fixed: 0 of 3 trials completed: no rate was found: MethodError: method fixed: learning_rate="
    )


class AtItsOwnRate(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.01
        super().step()


AT_ITS_OWN_RATE = Method(name="own", optimizer=(AtItsOwnRate, {}))


def test_no_rate_is_chosen_among_those_that_make_no_difference(asked, capsys):
    asked[asked.index("lora")] = "cli.test_sweep:AT_ITS_OWN_RATE"
    assert main([*asked, "--learning-rate", "1e-4..1e-2"]) == 1
    line, _ = capsys.readouterr().out.splitlines()
    assert line.startswith("own: 3 of 3 trials completed: no rate was found: the loss is ")
    assert line.endswith(
        " to the last bit at 0.0001, 0.001, 0.01: its optimizer may not use learning_rate, or they are too low"
    )
    assert json.loads(Path("found.json").read_text("utf-8"))["sweep"]["found"] == {}


@pytest.fixture
def asked(micro, tmp_path, monkeypatch):
    """A search of three trials, into `found.json` in the folder that the test is in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.json").write_text(json.dumps(turns(24)), "utf-8")
    words = f"sweep --model {micro.location} --method lora --budget 3 --max-steps 2 --max-length 48 --output found.json"
    return words.split()


def test_no_link_is_followed_by_a_sweep(asked, tmp_path):
    """Under the name that a temporary file had once."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".found.json.partial").symlink_to("precious")
    assert main(asked) == 0
    assert (tmp_path / "precious").read_text() == "precious"
    assert len(record.load(tmp_path / "found.json").entries) == 3


def test_a_second_sweep_into_the_same_record_is_refused_in_a_line_and_takes_nothing_from_the_first(asked, capsys):
    """Each writes all of its own record."""
    with files.alone(Path("found.json")):
        assert main(asked) == 2
    line = f"lightweight: --output found.json: process {os.getpid()} searches there: wait for it\n"
    assert capsys.readouterr().err == line
    assert [path.name for path in Path.cwd().iterdir()] == ["corpus.json"]


@pytest.mark.parametrize("put", [lambda mark: mark.symlink_to("precious"), os.mkfifo, Path.mkdir])
def test_what_somebody_has_put_in_the_place_of_a_sweeps_lock_is_refused_in_a_line(asked, capsys, put):
    put(Path(".found.json.lock"))
    assert main(asked) == 2
    line = capsys.readouterr().err
    assert line.startswith("lightweight: .found.json.lock: cannot be read or written (") and line.count("\n") == 1


def test_a_file_that_is_no_sweep_is_refused(tmp_path):
    other = tmp_path / "other.json"
    for text in ("{}", "[", '{"sweep": {"found": {"lora": {"learning_rate": -1}}}}', '{"sweep": 3}', "[" * 100_000):
        other.write_text(text, "utf-8")
        with pytest.raises(ValueError, match="is not the record of a sweep: give what `lightweight sweep` wrote"):
            SweptRates.read(str(other))
    with pytest.raises(ValueError, match="cannot be read"):
        Settings.read(lambda name: "nowhere.json" if name == "learning_rate" else None)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--learning-rate", "1e-3"], "--learning-rate 1e-3: give a range, such as 1e-5..1e-2"),
        (["--learning-rate", "1e-2..1e-3"], "give two rates above 0, the lower one first"),
        (["--budget", "2"], "--budget 2: give at least 3 trials per method"),
        (["--seed", "-1"], "--seed -1: give a number from 0 to 4294967295"),
        (["--method", "lorra"], "did you mean lora"),
        (["--output", "nowhere/x.json"], "there is no folder"),
        (["--output", "."], "it is a folder: name a file in it"),
        (["--corpus", "nowhere.json"], "does not exist"),
    ],
)
def test_bad_input_is_one_line(arguments, problem, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "--model", "opt-tiny", "--method", "lora", "--output", "x.json", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert problem in line
