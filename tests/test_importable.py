import functools
import importlib
import importlib.metadata
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lightweight import importable, record, targets
from lightweight.child.owner import Child
from lightweight.methods import BASELINE, LORA, METHODS, CapturedStep, Method, MethodError, named
from lightweight.record import writing
from lightweight.trial import Trial

SOURCE = """
import torch

SCALE = 2.0

def helper(x):
    return x * SCALE

def loss(outputs, labels, num_items_in_batch):
    return helper(outputs.logits.sum())

def other():
    return 1
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A module of somebody's own, with what it says replaced."""

    def write(*changes):
        source = SOURCE
        for old, new in changes:
            assert old in source
            source = source.replace(old, new)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "somebodys.py").write_text(source)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "somebodys", raising=False)
        return importlib.import_module("somebodys")

    return write


def test_a_changed_function_is_a_changed_method(written):
    def digest(*changes):
        return record.method_digest(Method(name="m", compute_loss=written(*changes).loss))

    first = digest()
    assert digest() == first
    assert digest(("logits.sum()", "logits.mean()")) != first
    assert digest(("x * SCALE", "x + SCALE")) != first  # what it calls
    assert digest(("SCALE = 2.0", "SCALE = 3.0")) != first  # what it reads
    assert digest(("return 1", "return 2")) == first  # what it does not


def test_what_a_partial_has_been_given_is_of_the_method(written):
    loss = written().loss
    digests = {
        record.method_digest(Method(name="m", compute_loss=value))
        for value in (loss, functools.partial(loss, labels=1), functools.partial(loss, labels=2))
    }
    assert len(digests) == 3


def test_what_a_package_has_is_told_by_its_path():
    assert importable.described(torch.optim.SGD) == {"import_path": "torch.optim.sgd:SGD"}
    optimizers = [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.SGD, {"momentum": 0.8})]
    digests = {record.method_digest(Method(name="m", optimizer=optimizer)) for optimizer in optimizers}
    assert len(digests) == 2


def test_a_record_has_the_versions_of_what_a_methods_own_modules_import(written, monkeypatch):
    usual = record.versions_of(LORA)
    assert "scipy" not in usual
    loss = written(("import torch\n", "import scipy.stats\nimport torch\n")).loss
    for value in (loss, functools.partial(loss, labels=1)):
        found = record.versions_of(Method(name="m", compute_loss=value))
        assert found == {**usual, "scipy": importlib.metadata.version("scipy")}
    installed = record.versions_of(Method(name="m", optimizer=(torch.optim.SGD, {})))
    assert installed == usual
    # and of what the Trainer imports for an optimizer
    monkeypatch.setattr(writing, "_owners", lambda: {"schedulefree": ["schedulefree"], "torch": ["torch"]})
    free = Method(name="m", training_arguments={"optim": "schedule_free_adamw"})
    assert "schedulefree" in record.versions_of(free)


def test_methods_that_bring_nothing_along_have_the_digests_that_records_have():
    stored = record.load(Path(__file__).parents[1] / "experiments" / "records" / "h100-t4.json")
    known = {entry.method: entry.method_digest for entry in stored.entries if entry.method_digest}
    found = {name: record.method_digest(method) for name, method in METHODS.items() if name in known}
    assert found
    assert found == {name: known[name] for name in found}


def local():
    def inside(outputs, labels, num_items_in_batch): ...

    return inside


class Instance:
    def __call__(self, outputs, labels, num_items_in_batch): ...


def module_level(outputs, labels, num_items_in_batch): ...


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (local(), r"its compute_loss is local.<locals>.inside, which no other process can import: define it"),
        (lambda *_: 0, r"its compute_loss is <lambda>"),
        (Instance(), r"its compute_loss is a Instance: give a function or a class of a module"),
        (functools.partial(local()), r"its compute_loss is local.<locals>.inside"),
    ],
)
def test_code_that_no_other_process_can_import_is_refused(value, expected):
    with pytest.raises(MethodError, match=f"method m: {expected}") as raised:
        Method(name="m", compute_loss=value)
    assert "\n" not in str(raised.value)


def test_code_of_the_main_script_is_refused(monkeypatch):
    monkeypatch.setattr(module_level, "__module__", "__main__")
    with pytest.raises(MethodError, match="its compute_loss is in __main__, which no other process can import"):
        Method(name="m", compute_loss=module_level)


def test_a_name_that_has_become_another_is_refused(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "module_level", None)
    with pytest.raises(MethodError, match="test_importable:module_level no longer"):
        Method(name="m", compute_loss=module_level_before)


module_level_before = module_level


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"step": "captured", "compute_loss": module_level}, "the captured step does not run its compute_loss"),
        ({"step": CapturedStep(), "callbacks": (Instance,)}, "the captured step does not run its callbacks"),
        ({"trainer": Instance}, "its trainer is not a subclass of transformers' Trainer"),
        ({"optimizer": (torch.optim.SGD,)}, r"its optimizer is a tuple: give \(class, keywords\)"),
        ({"callbacks": [Instance]}, "its callbacks are not a tuple"),
    ],
)
def test_what_could_not_be_run_is_refused(changes, expected):
    with pytest.raises(MethodError, match=f"method m: {expected}"):
        Method(name="m", **changes)


def test_a_peer_trains_with_nothing_of_ones_own():
    with pytest.raises(MethodError, match="method lora: unsloth does not support your own optimizer"):
        Method(name="lora", adapter=LORA.adapter, library="unsloth", optimizer=(torch.optim.SGD, {}))


@pytest.mark.parametrize(
    ("changes", "world_size", "expected"),
    [
        ({"optimizer": (torch.optim.Adagrad, {})}, 2, "with its own optimizer several ranks may train differently"),
        ({"compute_loss": module_level, "optimizer": (torch.optim.SGD, {})}, 2, "with its own compute_loss several"),
        (
            {"optimizer": (torch.optim.SGD, {}), "training_arguments": {"optim": "sgd"}},
            1,
            "optim='sgd' would be ignored",
        ),
        (
            {"compute_loss": module_level, "training_arguments": {"label_smoothing_factor": 0.1}},
            1,
            "label_smoothing_factor=0.1 would be ignored, since its compute_loss",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(micro, small_corpus, changes, world_size, expected):
    method = Method(name="m", **changes)
    with pytest.raises(ValueError, match=f"method m: {expected}"):
        Trial(model=micro, method=method, target=targets.CPU, corpus=small_corpus, world_size=world_size)


MINE = """
from lightweight.methods import Method

def loss(outputs, labels, num_items_in_batch):
    return outputs.logits.float().pow(2).mean()

MINE = Method(name="mine", compute_loss=loss)
"""


def test_a_method_is_found_in_a_file_and_its_code_by_a_child(tmp_path, monkeypatch, micro, small_corpus, without_gpu):
    (tmp_path / "a_file_of_mine.py").write_text(textwrap.dedent(MINE))
    monkeypatch.setattr(sys, "path", list(sys.path))
    method = named(f"{tmp_path}/a_file_of_mine.py:MINE")
    own_code = record.writing.own_code(method)
    assert own_code is not None and own_code["compute_loss"]["import_path"] == "a_file_of_mine:loss"
    trial = Trial(model=micro, method=method, target=targets.CPU, corpus=small_corpus, max_steps=2)
    (tmp_path / "trial").mkdir()
    with Child(trial, tmp_path / "trial") as child:
        outcome = child.finish()
    assert outcome.kind == "completed", outcome


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nowhere.py:MINE", "cannot be imported: there is no file .*nowhere.py"),
        ("my-file.py:MINE", "my-file.py has no name that Python can import"),
        ("string.py:MINE", r"string is already the name of .*string\S*\.py: give the file another name"),
    ],
)
def test_a_file_that_cannot_be_imported_is_told(tmp_path, monkeypatch, name, expected):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for file in ("my-file.py", "string.py"):
        (tmp_path / file).write_text(MINE)
    with pytest.raises(ValueError, match=expected):
        named(f"{tmp_path}/{name}")


def test_the_stock_methods_bring_nothing_along():
    assert record.writing.own_code(BASELINE) is None
