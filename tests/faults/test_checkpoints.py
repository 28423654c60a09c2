"""A checkpoint is damaged: the one before it is gone on with, said in a line; where there is none, that is one line."""

import json
import os
import shutil
from pathlib import Path

import pytest

from faults.harness import result
from lightweight.__main__ import main
from lightweight.cli import checkpoints

METHODS_TRIED = ("constant:STOCK", "constant:CAPTURED")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """method -> `DIR.partial` of a job that was stopped after step 6, and the result of one that was not."""
    return {}


@pytest.fixture
def job(given, interrupted, tmp_path, tmp_path_factory, monkeypatch):
    """An interrupted job in `tmp_path / "cut"`, its command, and the result it should have."""

    def arrange(method: str, *more: str):
        if (method, *more) not in interrupted:
            kept = tmp_path_factory.mktemp("kept")
            assert main(given(kept / "whole", *more, method=method)) == 0
            with monkeypatch.context() as patched:
                patched.setattr(checkpoints.StopRequest, "training_begins", stop_after_six)
                assert main(given(kept / "cut", *more, method=method)) == 130
            interrupted[method, *more] = kept
        kept = interrupted[method, *more]
        shutil.copytree(kept / "cut.partial", tmp_path / "cut.partial")
        return given(tmp_path / "cut", "--resume", *more, method=method), result(kept / "whole")

    return arrange


def stop_after_six(self: checkpoints.StopRequest) -> None:
    class AtSix:
        """True from the sixth time on that it is asked for, which is once a step."""

        asked = 0

        def __bool__(self) -> bool:
            self.asked += 1
            return self.asked >= 6

    self._stage, self.came = "training", AtSix()  # type: ignore[assignment]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def null(path: Path) -> None:
    path.write_text("null")


def swap(path: Path) -> None:
    """What the other checkpoint has."""
    other = path.parents[1] / ("checkpoint-3" if path.parent.name == "checkpoint-6" else "checkpoint-6")
    if not (other / path.name).exists() or (other / path.name).read_bytes() == path.read_bytes():
        flip(path)
    else:
        shutil.copy(other / path.name, path)


def names_it(name: str, line: str) -> bool:
    """Whether `line` names the damaged file; by another one's manifest every file is damaged."""
    return name in line or name == checkpoints.MANIFEST_NAME


DAMAGES = (Path.unlink, truncate, empty, flip, null, swap)


@pytest.mark.parametrize("method", METHODS_TRIED)
def test_a_damaged_checkpoint_is_passed_over_in_a_line(job, tmp_path, whole, tried, capsys, method):
    command, expected = job(method)
    partial = tmp_path / "cut.partial"
    names = sorted(path.name for path in (partial / "checkpoint-6").iterdir())
    assert {path.name for path in partial.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    faults = [(name, damage) for name in names for damage in DAMAGES]
    if not whole:
        faults = [(name, DAMAGES[index % len(DAMAGES)]) for index, name in enumerate(names)][::3]
    kept = shutil.copytree(partial, tmp_path / "kept")
    for name, damage in faults:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        shutil.copytree(kept, partial)
        damage(partial / "checkpoint-6" / name)
        capsys.readouterr()
        status = main(command)
        said = capsys.readouterr()
        told = [line for line in said.out.splitlines() if "is not whole" in line]
        survived = status == 0 and result(tmp_path / "cut") == expected and len(told) == 1 and names_it(name, told[0])
        tried("damaged checkpoint, with one before it", survived=survived)
        assert survived, (name, damage, status, said)
        assert "going on after step 3 of 7" in said.out


@pytest.mark.parametrize("method", METHODS_TRIED[:1])
def test_where_no_checkpoint_is_whole_that_is_one_line(job, tmp_path, whole, tried, capsys, method):
    command, _ = job(method)
    partial = tmp_path / "cut.partial"
    shutil.rmtree(partial / "checkpoint-3")
    kept = shutil.copytree(partial, tmp_path / "kept")
    names = sorted(path.name for path in (partial / "checkpoint-6").iterdir())
    faults = [(name, damage) for name in names for damage in DAMAGES]
    for name, damage in faults if whole else faults[::7]:
        shutil.rmtree(partial)
        shutil.copytree(kept, partial)
        damage(partial / "checkpoint-6" / name)
        capsys.readouterr()
        status = main(command)
        (line,) = capsys.readouterr().err.splitlines()
        survived = status == 2 and names_it(name, line) and "no checkpoint is left" in line and partial.exists()
        tried("damaged checkpoint, the only one", survived=survived)
        assert survived, (name, damage, status, line)


def test_a_checkpoint_under_another_ones_name_or_without_manifest_is_not_gone_on_with(job, tmp_path, capsys):
    command, expected = job("constant:STOCK")
    partial = tmp_path / "cut.partial"
    shutil.copytree(partial / "checkpoint-6", partial / "checkpoint-7")
    shutil.copytree(partial / "checkpoint-6", partial / "checkpoint-8")
    (partial / "checkpoint-8" / checkpoints.MANIFEST_NAME).unlink()
    (partial / "checkpoint-6" / "added.bin").touch()
    (partial / "checkpoint-nine").mkdir()
    assert main(command) == 2
    assert "checkpoint-nine was not written by `lightweight train`: move it away" in capsys.readouterr().err
    (partial / "checkpoint-nine").rmdir()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "checkpoint-7 is not whole: it was saved after step 6" in said
    assert "checkpoint-8 is not whole: its manifest.json is missing" in said
    assert "checkpoint-6 is not whole: added.bin was not saved with it" in said
    assert result(tmp_path / "cut") == expected


def elsewhere(path: Path) -> Path:
    """Where what was at `path` lies now."""
    return path.rename(path.parents[1 if path.name.startswith("checkpoint") else 2] / "moved")


def a_pipe(path: Path) -> None:
    elsewhere(path)
    os.mkfifo(path)


def a_link_to_nothing(path: Path) -> None:
    elsewhere(path)
    path.symlink_to("nothing")


def a_link_to_another(path: Path) -> None:
    path.symlink_to(elsewhere(path).parent / "cut.partial" / "checkpoint-3")


def a_file(path: Path) -> None:
    elsewhere(path)
    path.touch()


def nested(path: Path) -> None:
    path.write_text("[" * 100_000)


def sealed_without_a_step(path: Path) -> None:
    manifest = checkpoints.read(path)
    assert manifest is not None
    (path / checkpoints.MANIFEST_NAME).unlink()
    (path / checkpoints.TRAINER_STATE).write_text("null")
    checkpoints.seal(path, manifest.job)


NO_CHECKPOINTS = [
    *(("", make) for make in (a_pipe, a_link_to_nothing, a_link_to_another, a_file, sealed_without_a_step)),
    *((checkpoints.MANIFEST_NAME, make) for make in (a_pipe, a_link_to_nothing, nested)),
    *((checkpoints.TRAINER_STATE, make) for make in (a_pipe, a_link_to_nothing)),
]


@pytest.mark.parametrize(("name", "make"), NO_CHECKPOINTS)
def test_what_lies_in_a_checkpoints_place_is_passed_over_and_makes_room(job, tmp_path, tried, capsys, name, make):
    command, expected = job("constant:STOCK")
    make(tmp_path / "cut.partial" / "checkpoint-6" / name)
    status = main(command)
    said = capsys.readouterr()
    survived = status == 0 and result(tmp_path / "cut") == expected and not (tmp_path / "cut.partial").exists()
    tried("something else in a checkpoint's place", survived=survived)
    assert survived, said
    assert "checkpoint-6 is not whole" in said.out and "going on after step 3 of 7" in said.out


def test_a_link_in_the_place_of_what_is_unfinished_is_not_followed(job, tmp_path):
    command, expected = job("constant:STOCK")
    (tmp_path / "somebodys").mkdir()
    (tmp_path / "somebodys" / "thesis.txt").touch()
    shutil.rmtree(tmp_path / "cut.partial" / "unfinished", ignore_errors=True)
    (tmp_path / "cut.partial" / "unfinished").symlink_to(tmp_path / "somebodys")
    assert main(command) == 0
    assert result(tmp_path / "cut") == expected
    assert [path.name for path in (tmp_path / "somebodys").iterdir()] == ["thesis.txt"]


def test_a_file_in_the_place_of_a_result_makes_room(job, tmp_path):
    command, expected = job("constant:STOCK")
    (tmp_path / "cut.partial" / "result").touch()
    assert main(command) == 0
    assert result(tmp_path / "cut") == expected


def test_two_whole_checkpoints_are_kept_whatever_else_lies_there(tmp_path):
    shelf_of = tmp_path / "job.partial"
    unfinished = shelf_of / "unfinished"
    for step in (5, 9):  # of another job's size, neither whole
        (shelf_of / f"checkpoint-{step}").mkdir(parents=True)
    (shelf_of / "checkpoint-5" / "damaged").touch()
    shelf = checkpoints.Shelf(shelf_of, None)
    for step in range(1, 8):
        folder = unfinished / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        checkpoints.seal(folder, {"seed": 0})
        shelf.add(folder)
        left = checkpoints.all_in(shelf_of)
        assert [checkpoints.problem(path) for path in left] == [None] * min(step, 2)
        assert [path.name for path in left] == [f"checkpoint-{n}" for n in range(step, max(0, step - 2), -1)]
    assert checkpoints.newest(shelf_of) == (shelf_of / "checkpoint-7", [])


@pytest.mark.parametrize("damage", [Path.unlink, truncate, flip])
def test_base_weights_that_are_not_whole_are_written_again(job, tmp_path, tried, damage):
    command, expected = job("constant:CAPTURED", "--weights", "random")
    damage(tmp_path / "cut.partial" / "base" / "model.safetensors")
    status = main(command)
    survived = status == 0 and result(tmp_path / "cut") == expected
    tried("damaged base weights", survived=survived)
    assert survived
