"""How did a trial end that raised an error? Memory of the device or the host, a full disk, or anything else."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import traceback
from pathlib import Path

import torch

from lightweight import importable
from lightweight.child import host_memory
from lightweight.methods import MethodError
from lightweight.models import first_line
from lightweight.targets import GiB, MiB
from lightweight.training.meter import DivergedError, Meter
from lightweight.trial import Crashed, Diverged, Measurements, OutOfMemory, Phase, Trial


def outcome_of(error: Exception, trial: Trial, meter: Meter | None, folder: Path) -> OutOfMemory | Diverged | Crashed:
    """How a trial in `folder` ended that raised `error`; `meter` is None where it had not got as far as having one."""
    phase: Phase = "start" if meter is None else meter.phase
    measured = Measurements() if meter is None else meter.measurements()
    reason = f"{type(error).__name__}: {first_line(error)}"
    match error:
        case DivergedError():
            return Diverged(step=error.step, reason=str(error), measured=measured)
        case torch.OutOfMemoryError() if meter is not None and _allocator_ran_out(meter.device):
            meter.read_device()
            meter.end_training()
            return OutOfMemory(
                phase=phase,
                requested_bytes=_requested_bytes(str(error)),
                budget_bytes=trial.target.budget_bytes or torch.cuda.get_device_properties().total_memory,
                reason=reason,
                measured=meter.measurements(),
            )
    if host_memory.ran_out(error):
        return host_memory.outcome(phase, reason, measured)
    if (full := full_disk(error, folder)) is not None:
        reason += f"; {full}"
    elif trial.method.own_code and not isinstance(error, MethodError):
        place = importable.place_of(error)
        reason += f" ({place})" if place else ""
    return Crashed(phase=phase, reason=reason, details=traceback.format_exc(), measured=measured)


SILENT = ("failed writing file", "unexpected pos", "iostream error")
"""What torch.save() says of a file that it cannot write: not why."""


def unwritten(error: Exception) -> int | None:
    """The error number of a file that could not be used. safetensors has it in its message; torch.save() has none, and
    EIO stands for it. None of any other error."""
    if isinstance(error, OSError):
        return error.errno
    message = str(error)
    if told := re.search(r"Error while serializing: .*\(os error (\d+)\)", message):
        return int(told[1])
    return errno.EIO if isinstance(error, RuntimeError) and any(words in message for words in SILENT) else None


def full_disk(error: Exception, folder: Path) -> str | None:
    """Which disk has no room for what is written into the scratch `folder`, and the mend; None where `error` is none.
    safetensors and torch have messages alone for it, and some of torch's do not say why."""
    number, message = unwritten(error), str(error)
    if number == errno.EFBIG or os.strerror(errno.EFBIG) in message:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        return f"a file in the scratch folder {folder} may have {limit} bytes by the limit of ulimit -f: raise it"
    is_told = any(number == each or os.strerror(each) in message for each in (errno.ENOSPC, errno.EDQUOT))
    try:
        usage = shutil.disk_usage(folder)
        may_be = not isinstance(error, OSError) and (number is not None or "writ" in message)
        if not is_told and (usage.free >= MiB or not may_be):
            return None
    except OSError:  # it is gone, and so nothing is known of its disk
        return None
    disk = next(path for path in (folder, *folder.parents) if path.is_mount())
    return (
        f"the scratch folder {folder} is on a disk that is full, {disk} with {usage.free / MiB:.0f} MiB of "
        f"{usage.total / MiB:.0f} free: free some space, or let TMPDIR name a larger one"
    )


def _allocator_ran_out(device: torch.device) -> bool:
    """Whether torch's caching allocator itself counted an out-of-memory on `device`, the trial's."""
    return device.type == "cuda" and bool(torch.cuda.memory_stats(device).get("num_ooms", 0) >= 1)


def _requested_bytes(message: str) -> int | None:
    """'Tried to allocate 394.00 MiB' in bytes; torch offers the figure nowhere but in its message."""
    units = {"bytes": 1, "KiB": 2**10, "MiB": MiB, "GiB": GiB}
    amount = re.search(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", message)
    return round(float(amount[1]) * units[amount[2]]) if amount else None
