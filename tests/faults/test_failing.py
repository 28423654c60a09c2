"""A change of a file fails in `train`, once or from then on: one line, or the result all the same; then `--resume` has
the same bits as a job without the fault."""

import errno
import itertools
import shutil
from pathlib import Path

import pytest
from cli.test_output import checkpoint, model, name_of, train

from faults.harness import Fail, points, result, run, starter
from lightweight.cli.output import Output, OutputError

JOBS = {
    "stock": ("constant:STOCK", (), 5),
    "captured": ("constant:CAPTURED", ("--weights", "random"), 3),
    "overwriting": ("constant:STOCK", ("--overwrite",), 3),
}
"""name -> method, options, and how many faults are a sample."""

ERRORS = ((errno.EROFS, True), (errno.EIO, False), (errno.ENOSPC, True), (errno.EMFILE, False), (errno.EDQUOT, False))
"""Each with whether it lasts."""

NOBODY = "leave alone what lies there"
"""The mend where somebody has changed the working files, which no fault here is."""

BESIDES = ("cannot be removed, and nothing in it is needed any more", "the previous model is complete in")
"""Told besides: of working files beside a result that is in its place, and of a model that cannot be put back."""


@pytest.mark.parametrize("job", JOBS)
def test_a_failing_change_is_a_line_and_the_job_resumes_to_the_same_bits(given, tmp_path, whole, tried, job):
    method, more, few = JOBS[job]
    out, old, tally = tmp_path / "out", tmp_path / "old", tmp_path / "tally"
    start = starter(given, old, method, more)

    status, said = run(start(out / "whole"), tmp_path, Fail(out, tally))
    assert status == 0, said
    expected, changes = result(out / "whole"), int(tally.read_text())
    shutil.rmtree(out / "whole")
    lost = []
    for at in points(changes, few, whole=whole):
        number, lasts = ERRORS[at % len(ERRORS)]
        folder = out / f"failed-{at}"
        arguments = start(folder)
        status, failed = run(arguments, tmp_path, Fail(out, tally, at, number, lasts))
        lines = [line for line in failed.splitlines() if line.startswith("lightweight: ")]
        told = [line for line in lines if not any(words in line for words in BESIDES)]
        is_told = "Traceback" not in failed and (status, len(told)) in ((0, 0), (2, 1)) and NOBODY not in failed
        places = (folder, folder.with_name(f"{folder.name}.partial") / "replaced")
        there = [place for place in places if list(place.glob("*.safetensors"))]
        kept = not old.exists() or status == 0 or result(old) in map(result, there)
        status, said = run([*arguments, "--resume"], tmp_path)
        survived = is_told and kept and status == 0 and result(folder) == expected and not list(out.glob("*.partial"))
        tried(f"a file operation of `train` fails, then resumed: {job}", survived=survived)
        if not survived:
            lost.append(f"{errno.errorcode[number]}{' from then on' * lasts} at {at} of {changes}:\n{failed}\n{said}")
        shutil.rmtree(out)
    assert not lost, "\n".join(lost)


def job_of(output: Output) -> None:
    """What a job does with its output, but for training."""
    output.claim(resume=False, overwrite=True)
    try:
        checkpoint(output, 3)
        checkpoint(output, 6)
        train(output, "new")
    finally:
        output.release()


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a model"])
def test_no_failing_change_of_an_output_loses_a_model(tmp_path, capsys, whole, tried, there):
    """The whole is gone on with afterwards, and leaves nothing beside the result."""
    lost = []
    numbers = [number for number, _ in ERRORS][: None if whole else 1]
    for number, lasts in itertools.product(numbers, (False, True)):
        for at in itertools.count(1):
            folder = tmp_path / f"{number}-{lasts}-{at}"
            folder.mkdir()
            if there == "a model":
                model(folder / "a", "old")
            elif there == "an empty folder":
                (folder / "a").mkdir()
            fault = Fail(folder, tmp_path / "tally", at, number, lasts)
            output, error = Output(folder / "a"), None
            with fault.armed():
                try:
                    job_of(output)
                except (OSError, OutputError) as raised:
                    error = raised
            if not fault.failed:
                break
            named = error is None or isinstance(error, OutputError) or error.filename is not None
            found = [name_of(path.parent) for path in folder.rglob("model.safetensors") if path.stat().st_size]
            kept = "new" in found or ("old" in found) == (there == "a model")
            end = go_on(folder / "a", overwrite=there == "a model") if kept and named else ""
            survived = named and kept and not end and [path.name for path in folder.iterdir()] == ["a"]
            tried("a file operation on an output fails, then gone on with", survived=survived)
            if not survived:
                left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
                lost.append((errno.errorcode[number], lasts, at, fault.failed, repr(error), found, end, left))
            shutil.rmtree(folder)
    assert not lost, "\n".join(map(str, lost))


def go_on(folder: Path, *, overwrite: bool) -> str:
    """The same with `--resume`, in the place of a job that failed; what is wrong then."""
    output = Output(folder)
    try:
        output.claim(resume=True, overwrite=overwrite)
        try:
            before = output.interrupted()
            if before is None or not before.is_finished:
                train(output, "new")
            output.publish()
        finally:
            output.release()
    except (OSError, OutputError) as error:
        return repr(error)
    return "" if name_of(folder) in ("new", "old") else "neither"
