"""Where a result goes: claimed, tried and locked before training. No torch, no training."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from samples import entry

from lightweight import record
from lightweight.cli import checkpoints
from lightweight.cli.output import MARK, Output, OutputError


def model(folder: Path, name: str) -> Path:
    """What `lightweight train` leaves, called `name` in its record."""
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record.document([entry(model=name)])))
    (folder / "model.safetensors").write_text(name)
    return folder


def name_of(folder: Path) -> str:
    return (folder / "model.safetensors").read_text()


def checkpoint(output: Output, step: int) -> None:
    folder = output.unfinished / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    checkpoints.seal(folder, {"seed": 0})
    checkpoints.Shelf(output.partial, None).add(folder)


def train(output: Output, name: str) -> None:
    """What a job does once it has trained."""
    model(output.unfinished / "result", name)
    with output.completing():
        pass
    output.publish()


def everything(folder: Path) -> list[tuple[str, int, bytes]]:
    """What lies in `folder`."""
    found = sorted(folder.rglob("*"))
    return [(str(path), path.lstat().st_mode, path.read_bytes() if path.is_file() else b"") for path in found]


def long_path(folder: Path) -> Path:
    while len(str(folder)) < os.pathconf("/", "PC_PATH_MAX") - 150:
        folder /= "d" * 100
    return folder / "a"


def ours(at: Path, act: Callable[[Path], object]) -> None:
    """What a job that was killed has left, and what somebody does there."""
    (at / "a.partial").mkdir()
    (at / "a.partial" / MARK).touch()
    act(at / "a.partial")


def linked(place: Path, at: Path) -> None:
    place.symlink_to(model(at / "b", "old"))


PLACES = {
    "a folder of somebody": (lambda at: (at / "a" / "thesis").mkdir(parents=True), r"already .* another folder$"),
    "a file": (lambda at: (at / "a").write_text("thesis"), r"already .* another folder$"),
    "a model": (lambda at: model(at / "a", "old"), "already exists: .* or --overwrite to replace it"),
    "a dangling link": (lambda at: (at / "a").symlink_to(at / "nowhere"), "is a link"),
    "a link to a folder": (lambda at: (at / "a").symlink_to(model(at / "b", "old")), "is a link"),
    "somebody's partial": (lambda at: (at / "a.partial" / "thesis").mkdir(parents=True), "move it away"),
    "a partial that is a file": (lambda at: (at / "a.partial").write_text("thesis"), "move it away"),
    "a partial that is a link": (lambda at: (at / "a.partial").symlink_to(model(at / "b", "old")), "is a link"),
    "a mark that is a link": (
        lambda at: ((at / "a.partial").mkdir(), (at / "a.partial" / MARK).symlink_to(at / "b"), (at / "b").touch()),
        "is a link",
    ),
    "somebody's file beside our mark": (
        lambda at: ours(at, lambda partial: (partial / "thesis").touch()),
        "thesis was not",
    ),
    "a link at the curves": (lambda at: ours(at, lambda partial: linked(partial / "runs", at)), "runs is a link"),
    "a link at the result": (lambda at: ours(at, lambda partial: linked(partial / "result", at)), "result is a link"),
    "a partial of another user": (lambda at: ours(at, lambda partial: os.chown(partial, 12_345, -1)), "somebody else"),
    "a partial that anybody can write to": (lambda at: ours(at, lambda partial: partial.chmod(0o777)), "anybody can"),
    "a mark that is a folder": (lambda at: (at / "a.partial" / MARK).mkdir(parents=True), "move it away"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_somebody_elses_is_refused_in_a_line_and_left_alone(tmp_path, place, overwrite):
    prepare, line = PLACES[place]
    if "another user" in place and os.geteuid():
        pytest.skip("only root can give a folder away")
    prepare(tmp_path)
    before = everything(tmp_path)
    output = Output(tmp_path / "a")
    if overwrite and place == "a model":
        output.claim(resume=False, overwrite=True)
        train(output, "new")
        output.release()
        assert name_of(tmp_path / "a") == "new" and len(list(tmp_path.iterdir())) == 1
        return
    with pytest.raises(
        OutputError, match=line if not overwrite or "already" not in line else "not a trained model"
    ) as told:
        output.claim(resume=False, overwrite=overwrite)
    assert "\n" not in str(told.value)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_an_empty_folder_is_nobodys_and_a_result_takes_its_place(tmp_path, resume):
    """Such as one that was made for it, or a probe's that could not be removed."""
    (tmp_path / "a").mkdir()
    output = Output(tmp_path / "a")
    output.claim(resume=resume, overwrite=False)
    train(output, "new")
    output.release()
    assert name_of(tmp_path / "a") == "new" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("trains", [True, False])
def test_what_somebody_puts_beside_the_working_files_stays_and_is_told_to_the_next(tmp_path, trains):
    output = Output(tmp_path / "a")
    output.claim(resume=False, overwrite=False)
    (output.partial / "thesis").write_text("mine")
    output.runs.symlink_to(model(tmp_path / "b", "old"))
    if trains:
        train(output, "new")
    output.release()
    assert (output.partial / "thesis").read_text() == "mine" and name_of(tmp_path / "b") == "old"
    assert not output.runs.is_symlink() and not output.result.exists()
    with pytest.raises(OutputError, match="partial is not of this version of `lightweight train`: move it away"):
        Output(tmp_path / "a").claim(resume=False, overwrite=True)
    assert (output.partial / "thesis").exists()


def test_a_link_that_comes_after_the_claim_gets_no_curves(tmp_path):
    output = Output(tmp_path / "a")
    output.claim(resume=False, overwrite=False)
    assert output.curves() == output.runs
    output.runs.symlink_to(model(tmp_path / "b", "old"))
    with pytest.raises(OutputError, match="runs is a link, and links are not followed: remove it"):
        output.curves()
    output.release()
    assert name_of(tmp_path / "b") == "old"


UNUSABLE = {
    "a name of 250 characters": lambda at: at / ("n" * 250),
    "a name of 300 characters": lambda at: at / ("n" * 300),
    "a path too long": long_path,
    "a path through a file": lambda at: at / "file" / "a",
    "a link in a circle": lambda at: at / "circle" / "a",
    "the root": lambda at: Path("/"),
    "a parent": lambda at: at / "folder" / "..",
    "what is no disk": lambda at: Path("/proc/lightweight"),
}


@pytest.mark.parametrize("place", UNUSABLE)
def test_what_cannot_be_written_is_refused_in_a_line(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for resume in (False, True):
        output = Output(UNUSABLE[place](tmp_path))
        with pytest.raises(OutputError, match=r"--output .*: (cannot be written|is not a folder name)"):
            output.claim(resume=resume, overwrite=False)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EPERM])
@pytest.mark.parametrize("there", ["nothing", "model"])
def test_what_cannot_be_renamed_is_refused_before_training(tmp_path, monkeypatch, number, there):
    """A mount point, a lower layer of an overlay, a sticky folder."""
    if there == "model":
        model(tmp_path / "a", "old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if tmp_path / "a" in (self, target):
            raise OSError(number, os.strerror(number))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match=rf"no folder can be renamed to it \({os.strerror(number)}\)"):
        Output(tmp_path / "a").claim(resume=False, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if there == "model" else [])


def test_a_real_mount_point_is_refused_before_training(tmp_path):
    program = (
        "import subprocess, sys; from pathlib import Path; from lightweight.cli.output import Output, OutputError\n"
        "subprocess.run(['mount', '-t', 'tmpfs', 'none', sys.argv[1]], check=True)\n"
        "try: Output(Path(sys.argv[1])).claim(resume=False, overwrite=True)\n"
        "except OutputError as error: print(error)"
    )
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount of one's own here")
    (tmp_path / "a").mkdir()
    command = ["unshare", "-rm", sys.executable, "-c", program, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "no folder can be renamed to it" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


HOLD = """
import os, sys, time
from pathlib import Path
from lightweight.cli.output import Output
Output(Path(sys.argv[1])).claim(resume=False, overwrite=False)
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_second_training_into_the_same_place_is_refused_until_the_first_has_ended_also_by_sigkill(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        process = first.stdout.readline().strip()
        (tmp_path / "link").symlink_to(tmp_path)
        for path in (tmp_path / "a", tmp_path / "link" / "a"):
            for options in ((False, False), (True, False), (False, True), (True, True)):
                with pytest.raises(OutputError, match=f"process {process} is training there"):
                    Output(path).claim(resume=options[0], overwrite=options[1])
        assert (tmp_path / "a.partial" / "unfinished").exists()
    finally:
        first.kill()
        first.communicate()
    output = Output(tmp_path / "a")
    output.claim(resume=False, overwrite=False)
    output.release()
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_of_two_that_begin_at_once_one_gets_it(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "a")]
    both = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    holders = [one for one in both if one.stdout and one.stdout.readline()]  # it ends at once where it is refused
    for one in both:
        one.kill()
    (refused,) = (one.communicate()[1] for one in both if one not in holders)
    assert "is training there" in refused
    (holder,) = holders
    holder.communicate()


def test_the_old_model_goes_only_when_the_new_one_is_there(tmp_path, monkeypatch):
    """The job is killed at each of the renames that exchange them, and after them."""
    rename = Path.rename
    for last in range(1, 7):
        at = tmp_path / str(last)
        model(at / "a", "old")
        done: list[int] = []

        def killed(self: Path, target: Path, done=done, last=last) -> Path:
            done.append(1)
            if len(done) == last:
                raise KeyboardInterrupt
            return rename(self, target)

        output = Output(at / "a")
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):  # noqa: PT012
            patched.setattr(Path, "rename", killed)
            patched.setattr(Output, "release", lambda self: None)
            output.claim(resume=False, overwrite=True)
            train(output, "new")
            raise KeyboardInterrupt
        if output._lock is not None:
            os.close(output._lock)
        names = {name_of(path.parent) for path in at.rglob("model.safetensors")}
        assert "old" in names or name_of(at / "a") == "new", last
        again = Output(at / "a")
        with pytest.raises(OutputError, match=r"already exists|has been trained"):
            again.claim(resume=False, overwrite=False)
        finished = (at / "a.partial" / "result").exists()
        assert name_of(at / "a") == ("new" if last == 6 else "old")
        again.claim(resume=True, overwrite=True)
        if finished:
            before = again.interrupted()
            assert before is not None and before.is_finished and before.settings["model"] == "new"
            again.publish()
        again.release()
        assert name_of(at / "a") == ("new" if finished or last == 6 else "old"), last
        assert [path.name for path in at.iterdir()] == ["a"], last


def test_a_result_that_cannot_be_put_into_its_place_stays_and_the_line_says_where(tmp_path):
    output = Output(tmp_path / "a")
    output.claim(resume=False, overwrite=False)
    model(tmp_path / "a", "somebody's")  # which came while it trained
    with pytest.raises(OutputError) as told:
        train(output, "new")
    output.release()
    (place,) = re.findall(r"the complete result is in (\S+):", str(told.value))
    assert name_of(Path(place)) == "new" and name_of(tmp_path / "a") == "somebody's"
    with pytest.raises(OutputError, match="already exists"):
        Output(tmp_path / "a").claim(resume=False, overwrite=False)
    (tmp_path / "a").rename(tmp_path / "b")
    again = Output(tmp_path / "a")
    with pytest.raises(OutputError, match="is trained, but has not been moved to its folder yet"):
        again.claim(resume=False, overwrite=False)
    again.claim(resume=True, overwrite=False)
    again.publish()
    again.release()
    assert name_of(tmp_path / "a") == "new" and not (tmp_path / "a.partial").exists()


def test_trained_weights_outlive_an_error_after_training(tmp_path):
    output = Output(tmp_path / "a")
    output.claim(resume=False, overwrite=False)
    model(output.unfinished / "result", "new")
    with pytest.raises(OSError, match="no room for the card"), output.completing():
        raise OSError(errno.ENOSPC, "no room for the card")
    output.release()
    assert name_of(output.rescued) == "new"
    with pytest.raises(OutputError, match="rescued is trained"):
        Output(tmp_path / "a").claim(resume=False, overwrite=False)
    assert name_of(output.rescued) == "new"


def test_trained_weights_that_cannot_be_renamed_either_stay_where_they_are(tmp_path, monkeypatch):
    output = Output(tmp_path / "a")
    output.claim(resume=False, overwrite=False)
    model(output.unfinished / "result", "new")

    def fail(self: Path, target: Path) -> Path:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))

    with monkeypatch.context() as patched, pytest.raises(OSError, match="Input/output error"):  # noqa: PT012
        patched.setattr(Path, "rename", fail)
        with output.completing():
            raise OSError(errno.ENOSPC, "no room for the card")
    output.release()
    assert name_of(output.unfinished / "result") == "new"


def test_a_model_that_cannot_be_put_back_is_told(tmp_path, monkeypatch, capsys):
    """The second rename of the trial fails, and the one that would mend it."""
    model(tmp_path / "a", "old")
    output, rename = Output(tmp_path / "a"), Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self == output.replaced:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    with monkeypatch.context() as patched, pytest.raises(OutputError, match="no folder can be renamed"):  # noqa: PT012
        patched.setattr(Path, "rename", fail)
        output.claim(resume=False, overwrite=True)
    told = f"the previous model is complete in {output.replaced} (Input/output error): move it back\n"
    assert capsys.readouterr().err == f"lightweight: {tmp_path / 'a'}: {told}"
    again = Output(tmp_path / "a")
    again.claim(resume=True, overwrite=True)
    again.release()
    assert name_of(tmp_path / "a") == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_and_a_result_are_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    synced: set[str] = set()

    def fsync(descriptor: int, fsync=os.fsync) -> None:
        synced.add(os.path.relpath(Path(f"/proc/self/fd/{descriptor}").readlink(), tmp_path))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    output = Output(tmp_path / "a")
    output.claim(resume=False, overwrite=False)
    checkpoint(output, 3)
    train(output, "new")
    output.release()
    for folder, names in (
        ("checkpoint-3", ("trainer_state.json", "manifest.json")),
        ("result", ("model.safetensors",)),
    ):
        at = f"a.partial/unfinished/{folder}"
        assert {at, *(f"{at}/{name}" for name in names)} <= synced
    assert {"a.partial", "."} <= synced  # the names


def test_what_cannot_be_removed_at_once_goes_with_its_job(tmp_path, monkeypatch):
    """As over NFS, where somebody still reads it. It is nothing to go on with."""
    output = Output(tmp_path / "a")
    output.claim(resume=False, overwrite=False)
    checkpoint(output, 3)
    failed: list[object] = []

    def rmdir(path, *, dir_fd=None, rmdir=os.rmdir) -> None:
        if not failed and str(path).endswith("checkpoint-3"):
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", rmdir)
    train(output, "new")
    assert failed
    output.release()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_cannot_be_removed_at_all_is_told(tmp_path, monkeypatch, capsys):
    output = Output(tmp_path / "a")
    output.claim(resume=False, overwrite=False)
    checkpoint(output, 3)

    def rmdir(path, *, dir_fd=None, rmdir=os.rmdir) -> None:
        if str(path).endswith("checkpoint-3"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", rmdir)
    train(output, "new")
    output.release()
    assert capsys.readouterr().err == (
        f"lightweight: {output.partial}: cannot be removed, and nothing in it is needed any more: remove it\n"
    )


def test_an_interrupted_job_is_neither_lost_nor_taken_over(tmp_path):
    output = Output(tmp_path / "a")
    output.claim(resume=False, overwrite=False)
    checkpoint(output, 4)
    output.release()
    for _ in range(2):
        with pytest.raises(OutputError, match="reached step 4 there"):
            Output(tmp_path / "a").claim(resume=False, overwrite=False)
    again = Output(tmp_path / "a")
    again.claim(resume=True, overwrite=False)
    found = again.interrupted()
    assert found is not None and found.checkpoint == output.partial / "checkpoint-4"
    again.release()
    assert checkpoints.problem(output.partial / "checkpoint-4") is None


@pytest.mark.parametrize("broken", [checkpoints.MANIFEST_NAME, "trainer_state.json"])
def test_a_checkpoint_that_a_disk_does_not_give_is_not_advised_to_be_replaced(tmp_path, monkeypatch, broken):
    output = Output(tmp_path / "a")
    output.claim(resume=False, overwrite=False)
    checkpoint(output, 4)
    output.release()

    def failing(own: Any) -> Any:
        def read(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.name == broken:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return own(path, *arguments, **options)

        return read

    for name in ("read_bytes", "read_text", "open"):
        monkeypatch.setattr(Path, name, failing(getattr(Path, name)))
    again = Output(tmp_path / "a")
    again.claim(resume=True, overwrite=False)
    with pytest.raises(OutputError, match=r"cannot be read \(Input/output error\).*give --resume again$"):
        again.interrupted()
    again.release()


def test_what_an_older_version_left_is_refused_in_a_line(tmp_path):
    (tmp_path / "a.partial" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "a.partial" / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4}')
    for resume, overwrite in ((True, False), (False, True), (False, False)):
        with pytest.raises(OutputError, match="is not of this version of `lightweight train`: move it away"):
            Output(tmp_path / "a").claim(resume=resume, overwrite=overwrite)
    assert (tmp_path / "a.partial" / "checkpoint-4" / "trainer_state.json").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_pipe_in_the_place_of_a_record_is_not_waited_for(tmp_path, overwrite):
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "record.json")
    with pytest.raises(OutputError, match="is not a trained model" if overwrite else "already exists"):
        Output(tmp_path / "a").claim(resume=False, overwrite=overwrite)


def test_working_files_are_nobody_elses_whatever_the_umask_says(tmp_path):
    before = os.umask(0)
    try:
        output = Output(tmp_path / "a")
        output.claim(resume=False, overwrite=False)
        train(output, "new")
        output.release()
    finally:
        os.umask(before)
    assert name_of(tmp_path / "a") == "new"


def test_a_link_to_nothing_and_a_pipe_are_not_waited_for_as_a_result_is_synced(tmp_path):
    output = Output(tmp_path / "a")
    output.claim(resume=False, overwrite=False)
    folder = model(output.unfinished / "result", "new")
    (folder / "latest").symlink_to("nothing")
    os.mkfifo(folder / "pipe")
    with output.completing():
        pass
    output.publish()
    output.release()
    assert name_of(tmp_path / "a") == "new" and (tmp_path / "a" / "latest").is_symlink()


@pytest.mark.parametrize("damage", [Path.unlink, Path.touch, lambda path: path.write_text('{"outcomes": [3]}')])
@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_finished_result_whose_record_is_damaged_is_not_trained_again(tmp_path, damage, has_checkpoint):
    output = Output(tmp_path / "a")
    output.claim(resume=False, overwrite=False)
    if has_checkpoint:
        checkpoint(output, 3)
    model(output.unfinished / "result", "new")
    with output.completing():
        pass
    output.release()
    (output.result / "record.json").write_text("")
    damage(output.result / "record.json")
    again = Output(tmp_path / "a")
    again.claim(resume=True, overwrite=False)
    with pytest.raises(
        OutputError, match=r"result is trained, but its record.json cannot be used \(.*\): move it away"
    ):
        again.interrupted()
    again.release()
    assert name_of(output.result) == "new"


@pytest.mark.parametrize("there", [False, True])
def test_a_result_whose_name_is_not_on_the_disk_yet_costs_no_model(tmp_path, monkeypatch, there):
    if there:
        model(tmp_path / "a", "old")
    output = Output(tmp_path / "a")
    output.claim(resume=False, overwrite=there)
    sync = checkpoints.sync

    def failing(path):
        if path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        sync(path)

    monkeypatch.setattr(checkpoints, "sync", failing)
    with pytest.raises(
        OutputError, match=r"a: the result is there, but may not outlive a power cut \(Input/output error"
    ):
        train(output, "new")
    output.release()
    assert name_of(tmp_path / "a") == "new"
    assert output.partial.exists() == there and (not there or name_of(output.replaced) == "old")
    monkeypatch.undo()
    again = Output(tmp_path / "a")
    again.claim(resume=True, overwrite=there)
    again.publish()
    again.release()
    assert name_of(tmp_path / "a") == "new" and [path.name for path in tmp_path.iterdir()] == ["a"]
