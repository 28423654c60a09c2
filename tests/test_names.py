"""Names that people type: what is near them is said, at once and in one line."""

import subprocess
import sys

import pytest

from lightweight import methods, models, names, targets
from lightweight.__main__ import main
from lightweight.models import ModelError


def test_the_names_of_methods_are_those_that_exist():
    assert tuple(methods.METHODS) == names.METHODS


@pytest.mark.parametrize(
    ("named", "text", "meant"),
    [
        (targets.named, "T4", "t4"),
        (targets.named, "RTX-4090", "rtx4090"),
        (targets.named, "h10", "h100"),
        (methods.named, "LoRA", "lora"),
        (methods.named, "qlora_captured", "qlora-captured"),
        (models.named, "opt350m", "opt-350m"),
        (models.named, "SmolLM2", "smollm2-135m"),
        (models.named, "gpt-neo1.3B", "gpt-neo-1.3b"),
    ],
)
def test_the_nearest_name_is_asked_for(named, text, meant):
    with pytest.raises(ValueError, match=f"; did you mean {meant}( or [^?]*)?[?]$"):
        named(text)


def test_what_is_near_nothing_is_not_asked_for():
    assert names.question("nosuch", models.MODELS) == ""


@pytest.mark.parametrize("text", ["16GB", "16gb", "16 GiB", "16G", "16"])
def test_an_amount_is_spelled_for_whoever_spells_it_otherwise(text):
    with pytest.raises(ValueError, match="is written 16GiB"):
        targets.named(text)


@pytest.mark.parametrize(
    "text", ["./nowhere", "/nowhere", "~/nowhere", "a/b/c", "nowhere/", "", "a\nb", "\x1b[31m", "a b", "x" * 5000, "\0"]
)
def test_what_can_be_no_model_is_refused_without_asking_the_hub(text):
    with pytest.raises(ModelError, match="no such folder") as refused:
        models.named(text)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 300


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match="is a file; give a folder"):
        models.named(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("text", ["gpt2", "somebody/something", "somebody/opt350m"])
def test_what_may_be_on_the_hub_is_left_to_it(text):
    assert models.named(text).source == text


def test_a_folder_may_be_called_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "opt350m\n").mkdir()
    assert models.named("opt350m\n").source == "opt350m\n"


BAD = [
    ["plan", "opt350m", "--target", "t4"],
    ["plan", "./nowhere"],
    ["plan", "opt-tiny", "--target", "T4"],
    ["plan", "opt-tiny", "--target", "16GB"],
    ["plan", "opt-tiny", "--method", "LoRA"],
    ["train", "--model", "opt350m", "--output", "out"],
    ["train", "--model", "opt-tiny", "--output", "out", "--target", "T4"],
    ["train", "--model", "opt-tiny", "--output", "out", "--method", "LoRA"],
]


def test_bad_names_are_refused_before_torch_is_imported(tmp_path):
    code = (
        "import sys\nfrom lightweight.__main__ import main\n"
        f"assert [main(arguments) for arguments in {BAD!r}] == [2] * {len(BAD)}\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stderr.splitlines()) == len(BAD)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "a\nb"],
        ["plan", "opt-tiny", "--target", "a\nb"],
        ["plan", "opt-tiny", "--method", "a\nb"],
        ["plan", "opt-tiny", "--method", "a\nb:C"],
        ["plan", "opt-tiny", "--record", "a\nb.json"],
        ["report", "a\x1b[31mb\r.json"],
        ["gate", "a\nb.json", "--against", "a\u2028b.json"],
    ],
)
def test_a_refusal_is_one_line_whatever_was_typed(capsys, arguments):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("lightweight: ")
    assert said.endswith("\n")
    assert said[:-1].isprintable()
