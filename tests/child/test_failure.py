"""What an error becomes."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from lightweight import targets
from lightweight.child import failure, host_memory
from lightweight.methods import BASELINE
from lightweight.training.meter import DivergedError, Meter
from lightweight.trial import Crashed, Diverged, OutOfMemory, Trial

pytestmark = pytest.mark.usefixtures("without_gpu")

CPU = torch.device("cpu")


@pytest.fixture
def trial(micro, small_corpus):
    return Trial(model=micro, method=BASELINE, target=targets.CPU, corpus=small_corpus, epochs=1)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 64.00 MiB. GPU 0 has", 64 * 2**20),
        ("CUDA out of memory. Tried to allocate 1.45 GiB. GPU", round(1.45 * 2**30)),
        ("Tried to allocate 512 bytes.", 512),
        ("something else", None),
    ],
)
def test_the_request_is_read_from_torchs_message(message, expected):
    assert failure._requested_bytes(message) == expected


def test_an_out_of_memory_that_the_allocator_did_not_count_is_a_crash(trial, monkeypatch):
    """On a GPU tests/child/test_owner.py shows the counted one."""

    def memory_stats(*_: object) -> None:
        raise RuntimeError("invalid argument")  # torch's, where CUDA was initialised and its devices were hidden since

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", memory_stats)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
    outcome = failure.outcome_of(error, trial, Meter(CPU, 0.0), Path())
    assert isinstance(outcome, Crashed)
    assert outcome.reason.startswith(type(error).__name__)


def test_the_hosts_memory_that_runs_out_is_told_from_the_devices(trial):
    outcome = failure.outcome_of(MemoryError("host"), trial, Meter(CPU, 0.0), Path())
    assert isinstance(outcome, OutOfMemory)
    assert outcome.reason.startswith("MemoryError: host; the host's memory: ")
    assert outcome.budget_bytes == host_memory.limit().bytes


@pytest.mark.parametrize("message", ["\n    Some tensors share memory\n  and more", "Some tensors share memory"])
def test_the_reason_is_the_first_line_that_says_something(trial, message):
    outcome = failure.outcome_of(RuntimeError(message), trial, Meter(CPU, 0.0), Path())
    assert outcome.reason == "RuntimeError: Some tensors share memory"


def test_failures_keep_their_place_and_reason(trial):
    meter = Meter(CPU, 0.0)
    meter.phase = "backward"
    outcome = failure.outcome_of(RuntimeError("CUDA error: device-side assert triggered\nmore"), trial, meter, Path())
    assert outcome.reason == "RuntimeError: CUDA error: device-side assert triggered"
    assert outcome.phase == "backward"  # type: ignore[union-attr]
    diverged = failure.outcome_of(DivergedError(7, "training loss is nan"), trial, meter, Path())
    assert isinstance(diverged, Diverged)
    assert (diverged.step, diverged.reason) == (7, "training loss is nan at step 7")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=errno.errorcode.get)
def test_a_disk_that_is_full_is_told_with_its_place_and_the_mend(trial, folder, number):
    for error in (OSError(number, os.strerror(number)), RuntimeError(f"I/O error: {os.strerror(number)}")):
        reason = failure.outcome_of(error, trial, None, folder).reason
        assert f"scratch folder {folder}" in reason
        assert reason.endswith("raise it" if number == errno.EFBIG else "let TMPDIR name a larger one"), reason
    other = OSError(errno.EACCES, os.strerror(errno.EACCES))
    assert str(folder) not in failure.outcome_of(other, trial, None, folder).reason


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.EROFS, "Read-only file system"), errno.EROFS),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), errno.EIO),
        (RuntimeError("basic_ios::clear: iostream error"), errno.EIO),
        (SafetensorError("Error while serializing: I/O error: Stale file handle (os error 116)"), errno.ESTALE),
        (SafetensorError("Error while deserializing: I/O error: Stale file handle (os error 116)"), None),
        (RuntimeError("something else"), None),
    ],
)
def test_what_cannot_be_written_is_known_from_messages(error, number):
    assert failure.unwritten(error) == number


def test_a_full_disk_is_told_where_torch_does_not_say_why(trial, folder, monkeypatch):
    with pytest.raises(RuntimeError) as raised:
        torch.save({"a": torch.zeros(9)}, "/dev/full")
    assert failure.full_disk(raised.value, folder) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 0))
    assert (
        f"scratch folder {folder} is on a disk that is full"
        in failure.outcome_of(raised.value, trial, None, folder).reason
    )
