"""`train` is killed at a change of a file, and gone on with by `--resume`: the same bits as without the kill."""

import shutil
import signal

import pytest

from faults.harness import Kill, points, result, run, starter

JOBS = {
    "stock": ("constant:STOCK", (), 1, 5),
    "captured": ("constant:CAPTURED", ("--weights", "random"), 1, 3),
    "two ranks": ("constant:STOCK", (), 2, 2),
    "captured, of two": ("constant:CAPTURED", (), 2, 1),
    "overwriting": ("constant:STOCK", ("--overwrite",), 1, 3),
}
"""name -> method, options, ranks, and how many kills are a sample."""


@pytest.mark.parametrize("job", JOBS)
def test_a_killed_job_resumes_to_the_same_bits(given, tmp_path, whole, tried, job):
    method, more, world_size, few = JOBS[job]
    out, old, name = tmp_path / "out", tmp_path / "old", f"train killed at a file operation, then resumed: {job}"
    start = starter(given, old, method, more)

    tally = tmp_path / "tally"
    status, said = run(start(out / "whole"), tmp_path, Kill(out, tally), world_size=world_size)
    assert status == 0, said
    expected, changes = result(out / "whole"), int(tally.read_text())
    shutil.rmtree(out / "whole")
    lost = []
    for at in points(changes, few, whole=whole):
        folder = out / f"cut-{at}"
        arguments = start(folder)
        kill = Kill(out, tally, at, torn=at % 3 == 0)
        status, killed = run(arguments, tmp_path, kill, world_size=world_size)
        assert status in (-signal.SIGKILL, 0), killed
        if old.exists():
            places = (folder, folder.with_name(f"{folder.name}.partial") / "replaced")
            assert any((place / "record.json").exists() for place in places), killed
        status, said = run([*arguments, "--resume"], tmp_path, world_size=world_size)
        survived = status == 0 and result(folder) == expected and not list(out.glob("*.partial"))
        tried(name, survived=survived)
        if not survived:
            lost.append(f"at {at} of {changes}:\n{killed}\n{said}")
        shutil.rmtree(out)
    assert not lost, "\n".join(lost)


def test_two_ranks_go_on_in_the_middle_of_a_second_epoch_with_its_order(given, tmp_path):
    """Killed while the last checkpoint is written, so that the one of step 6, of four an epoch, is gone on from."""
    out = tmp_path / "out"
    assert run(given(out / "whole"), tmp_path, world_size=2)[0] == 0
    assert run(given(out / "cut"), tmp_path, Kill(out, tmp_path / "tally", at=46), world_size=2)[0] == -signal.SIGKILL
    status, said = run([*given(out / "cut"), "--resume"], tmp_path, world_size=2)
    assert status == 0 and "going on after step 6 of 7" in said, said
    assert result(out / "cut") == result(out / "whole")
