"""Damaged records, corpora, models, command lines and outputs: a line and status 2 (1 where that is the verdict), or
the right answer. A sample of each; with `--faults` as many as a judge would try."""

import copy
import fcntl
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from samples import entry

from conftest import MICRO
from faults import mutants
from faults.harness import outcome_of, result, steers
from faults.mutants import STEERING
from lightweight import models, record
from lightweight.__main__ import main
from lightweight.cli.output import MARK
from lightweight.settings import SETTINGS
from lightweight.verdict.limits import LIMITS

RECORDS = sorted((Path(__file__).parents[2] / "experiments" / "records").glob("*.json"))

LLAMA = {
    **{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 384},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256},
}


def records() -> list[Any]:
    """The committed records, what is much and alike left out of them."""
    kept = ("outcomes", "forecasts", "datetime", "commit_info", "machine_info", "version")
    found = [json.loads(path.read_text("utf-8")) for path in RECORDS]
    return [{key: each[key] for key in kept if key in each} if isinstance(each, dict) else each for each in found]


def clear(folder: Path) -> list[Path]:
    """Remove what a job that had no result has left of its output `a`, which is nothing; what it was."""
    left = list(folder.glob("a*"))
    for path in left:
        shutil.rmtree(path)
    return left


def test_mutated_records_are_a_line_or_an_answer(tmp_path, seeds, whole, tried, capfd):
    documents, path, page = records(), tmp_path / "mutant.json", tmp_path / "page.html"
    lost = []
    for seed in seeds(50_000, 400):
        draw = random.Random(seed)
        index = draw.randrange(len(documents))
        mutant = copy.deepcopy(documents[index])
        done = mutants.document(mutant, draw, draw.choice((1, 1, 2, 4)))
        text = json.dumps(mutant)
        if draw.random() < 0.1:
            at = draw.randrange(len(text))
            text, done = draw.choice((text[:at], text[:at] + "\x00" + text[at:], text + text)), ["as text"]
        path.write_text(text, "utf-8")
        other = str(draw.choice(RECORDS))
        commands = (
            ["report", str(path), "--format", draw.choice(("terminal", "markdown", "html"))],
            ["report", other, str(path), "-o", str(page)],
            ["gate", str(path), "--against", other],
            ["gate", other, "--against", str(path)],
            ["gate", str(path), "--against", str(RECORDS[index])],
            ["plan", "opt-350m", "--method", "no-such-method", "--record", str(path)],
        )
        for command in commands if whole else draw.sample(commands, 2):
            found = outcome_of(command, capfd)
            survived = found.is_a_line or (found.status in (0, 1) and not found.err and not steers(found.out))
            if page.exists():
                text = page.read_text("utf-8")
                survived = survived and not steers(text.replace("\n", "").replace("\t", ""))
                page.unlink()
            tried(f"mutated records, {command[0]}", survived=survived)
            if not survived:
                lost.append((seed, RECORDS[index].name, done, command[0], found))
    assert not lost, "\n".join(map(str, lost))


@pytest.mark.parametrize("place", ["a", "a.partial/result"])
def test_a_finished_job_with_a_mutated_record_is_a_line_or_the_result(given, tmp_path, seeds, tried, capfd, place):
    """Resumed with its method and without. Nothing is trained, and the weights stay."""
    command, lost = given(tmp_path / "a"), []
    assert main(command) == 0
    kept = (tmp_path / "a").rename(tmp_path / "kept")
    weights = (kept / "model.safetensors").read_bytes()
    for seed in seeds(100_000, 100):
        clear(tmp_path)
        (tmp_path / "a.partial").mkdir()
        (tmp_path / "a.partial" / MARK).touch()
        folder, draw = shutil.copytree(kept, tmp_path / place), random.Random(seed)
        content = json.loads((folder / "record.json").read_text("utf-8"))
        within = draw.choice((content, content["outcomes"][0]))
        done = mutants.document(within, draw, draw.choice((1, 2)))
        (folder / "record.json").write_text(json.dumps(content), "utf-8")
        at = command.index("--method")
        words = draw.choice((command, command[:at] + command[at + 2 :]))
        found = outcome_of([*words, "--resume"], capfd)
        left = [path.read_bytes() for path in tmp_path.glob("a*/**/*.safetensors")]
        survived = left == [weights] and (found.is_a_line or (found.status == 0 and not found.err))
        tried("mutated records, resumed", survived=survived)
        if not survived:
            lost.append((seed, done, found))
    assert not lost, "\n".join(map(str, lost))


def test_mutated_corpora_are_a_line_or_train_what_they_say(given, dialogues, tmp_path, seeds, tried, capfd):
    lost, path = [], tmp_path / "mutant.json"
    for seed in seeds(60_000, 150):
        path.unlink(missing_ok=True)
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        shutil.copy(dialogues, path)
        done = mutants.corpus(path, random.Random(seed))
        found = outcome_of([*given(tmp_path / "a"), "--corpus", str(path), "--max-steps", "1"], capfd)
        survived = found.is_a_line and "corpus" in found.err
        if found.status == 0:
            record = json.loads((tmp_path / "a" / "record.json").read_text("utf-8"))["outcomes"][0]
            said = json.loads(path.read_bytes().decode("utf-8-sig"))
            survived = record["steps"] == 1 and all(turn["content"].strip() for turn in said) and len(said) % 2 == 0
            shutil.rmtree(tmp_path / "a")
        survived = not clear(tmp_path) and survived
        tried("mutated corpora", survived=survived)
        if not survived:
            lost.append((seed, done, found))
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
    assert not lost, "\n".join(map(str, lost))


@pytest.mark.parametrize("architecture", ["opt", "llama"])
def test_broken_model_folders_are_a_line_or_the_right_answer(given, tmp_path, seeds, tried, capfd, architecture):
    kind = MICRO.architecture if architecture == "opt" else LLAMA
    whole = tmp_path / "whole"
    whole.mkdir()
    found, _ = models.find(replace(MICRO, architecture=kind))
    models.write(found, whole, seed=3)
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    if architecture == "llama":
        (whole / "chat_template.jinja").write_text(template)
    out, lost = tmp_path / "a", []
    command = [*given(out), "--max-steps", "1", "--model"]
    assert main([*command, str(whole)]) == 0
    right = result(out)
    shutil.rmtree(out)
    for seed in seeds(70_000 if architecture == "opt" else 80_000, 110):
        folder = shutil.copytree(whole, tmp_path / "model")
        done = mutants.folder_of_a_model(folder, random.Random(seed))
        found = outcome_of([*command, str(folder)], capfd)
        survived = found.is_a_line or (
            found.status == 1 and "hold NaN or infinity" in found.err and found.err.count("\n") == 1
        )
        if found.status == 0:
            # what has changed nothing of the network, or is a setting of which there may be others
            survived = not found.err and (result(out) == right or ".json /" in done or "flipped" in done)
            survived = survived or "chat_template" in done or "in it" in done
            shutil.rmtree(out)
        left = clear(tmp_path)  # of a job that diverged, what it had trained until then
        survived = survived and (found.status == 1 or not left)
        tried("broken model folders", survived=survived)
        if not survived:
            lost.append((seed, done, found))
        shutil.rmtree(folder)
    assert not lost, "\n".join(map(str, lost))


WORDS = (
    *("", " ", "-", "--", "-1", "0", "1", "2", "1e3", "nan", "inf", "1_0", "0x10", "1.5", "9" * 5000, "٣", "²"),
    *("a\nb", "\x1b[31m", "\u202e", "\udcff", "x" * 300, "..", ".", "/", "~", "/dev/null", "/proc/self/mem", "a:b"),
    *("os:system", ":", "a.b:C", "lora", "baseline", "opt-350m", "t4", "16GiB", "-5GiB", "1e400GiB", "none", "[]"),
)
OPTIONS = {
    "train": "--method --target --weights --epochs --seed --save-steps --report-to --corpus --model --resume "
    f"--overwrite {' '.join(setting.flag for setting in SETTINGS)}",
    "plan": "--method --target --gpus --record --format --max-batch --traceback "
    + " ".join(setting.flag for setting in SETTINGS),
    "report": "-o --format --into --figures",
    "gate": f"--against --undecided --missing --require-match {' '.join(limit.flag for limit in LIMITS)}",
    "chat": "--prompt --system --max-tokens --temperature",
}
FLAGS = ("--resume", "--overwrite", "--max-batch", "--traceback", "--require-match")


def command_line(draw: random.Random, given: list[str]) -> list[str]:
    """A random one, which may be right by chance; what it would train is one step."""
    command = draw.choice(list(OPTIONS))
    words = given[:] if command == "train" else [command]
    if command != "train" and draw.random() < 0.9:
        words.append(draw.choice((*WORDS, str(draw.choice(RECORDS)))))
    for option in draw.choices(OPTIONS[command].split(), k=draw.choice((1, 1, 2, 3))):
        words += [option] if option in FLAGS else [option, draw.choice(WORDS)]
    if draw.random() < 0.1:
        words.insert(
            draw.randrange(len(words) + 1), draw.choice(("--bogus", f"--bogus={STEERING}", STEERING, "-o-", "--m"))
        )
    return [*words, "--max-steps", "1"] if command == "train" else words


def test_random_command_lines_are_a_line_or_an_answer(given, tmp_path, seeds, tried, capfd, monkeypatch):
    lost = []
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for seed in seeds(90_000, 400):
        folder = tmp_path / f"here-{seed}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        words = command_line(random.Random(seed), given(tmp_path / "a"))
        found = outcome_of(words, capfd)
        survived = found.is_a_line or (found.status in (0, 1) and found.err.count("\n") <= 1 and not steers(found.out))
        for path in tmp_path.glob("a*"):
            survived = survived and found.status == 0 and path.name == "a"
            shutil.rmtree(path)
        tried("random command lines", survived=survived)
        if not survived:
            lost.append((seed, words, found))
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(folder)
    assert not lost, "\n".join(map(str, lost))


def a_model(place: Path) -> None:
    place.mkdir()
    (place / "record.json").write_text(json.dumps(record.document([entry()])))


def somebodys(place: Path) -> None:
    place.mkdir()
    (place / "thesis.txt").write_text("all of it")


def in_use(place: Path) -> None:
    """Locked by another training, which ends with the test."""
    partial = place.with_name(f"{place.name}.partial")
    partial.mkdir()
    IN_USE.append(os.open(partial / MARK, os.O_RDWR | os.O_CREAT))
    fcntl.flock(IN_USE[-1], fcntl.LOCK_EX)


IN_USE: list[int] = []

PLACES: dict[str, Callable[[Path], object]] = {
    "free": lambda place: None,
    "an empty folder": Path.mkdir,
    "a file": Path.touch,
    "a pipe": lambda place: os.mkfifo(place),
    "a link to a folder": lambda place: place.symlink_to(place.parent),
    "a link to nothing": lambda place: place.symlink_to("nothing"),
    "a link to itself": lambda place: place.symlink_to(place),
    "a model": a_model,
    "somebody's": somebodys,
}
"""What is at the output's place, or at that of `DIR.partial`."""

NAMES = ("a", "a b", "-a", "ä\u0301한", "n\nl", "\x1b[31m", "\udcff", "x" * 240, "x" * 247, "x" * 248, "x" * 255)
NO_PLACES = (
    "",
    ".",
    "..",
    "/",
    "/dev/null",
    "/dev/null/a",
    "/proc/a",
    "/sys/a",
    "/proc/self/fd/0",
    "~",
    "a/../b",
    "a//b/",
)


def test_outputs_of_all_kinds_are_a_line_or_the_result_and_nobody_loses_a_file(
    given, tmp_path, whole, tried, capfd, monkeypatch
):
    """Every pair of what is there and what is beside it, every name, with and without --overwrite and --resume."""
    cases = [(place, beside, "a") for place in PLACES for beside in (*PLACES, "in use")]
    cases += [("free", "free", name) for name in (*NAMES, *NO_PLACES, "/".join(["y" * 200] * 25))]
    asked = [(*case, more) for case in cases for more in ((), ("--overwrite",), ("--resume",))]
    lost = []
    for number, (place, beside, name, more) in enumerate(asked if whole else random.Random(5).sample(asked, 25)):
        folder = tmp_path / f"case-{number}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        output = Path(name)
        PLACES[place](output)
        partial = output.with_name(f"{output.name}.partial") if output.name else output
        (in_use if beside == "in use" else PLACES[beside])(output if beside == "in use" else partial)
        before = listing(folder)
        command = [word if word != "OUTPUT" else f"--output={name}" for word in given(Path("OUTPUT"))]
        command.remove("--output")
        found = outcome_of([*command, "--max-steps", "1", *more], capfd)
        after = listing(folder)
        if found.status == 0:
            survived = len(list(folder.glob("**/record.json"))) >= 1 and not found.err and not steers(found.out)
        else:
            survived = found.is_a_line and after == before
        survived = survived and before & SOMEBODYS == after & SOMEBODYS
        tried("output paths", survived=survived)
        if not survived:
            lost.append((place, beside, name, more, found, sorted(after ^ before)))
        while IN_USE:
            os.close(IN_USE.pop())
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(folder)
    assert not lost, "\n".join(map(str, lost))


SOMEBODYS = {"a/thesis.txt", "a.partial/thesis.txt", "a.partial/record.json"}


def listing(folder: Path) -> set[str]:
    """What lies there; empty folders are nobody's loss."""
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return {str(path.relative_to(folder)) for path in found}
