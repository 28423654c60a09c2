import os
import re
import subprocess
import sys

import pytest


def test_importing_it_leaves_torchs_own_answers_in_place():
    program = (
        "import torch; original, compile = torch.cuda.get_device_capability, torch.compile\n"
        "from lightweight import preload\n"
        "assert torch.cuda.get_device_capability is original and torch.compile is compile\n"
        "assert not torch.cuda.is_initialized()\n"
        "import sys; assert 'bitsandbytes' in sys.modules and 'pytest' not in sys.modules\n"
        "assert 'torch._inductor.lowering' not in sys.modules, 'the compiler was loaded for nothing'\n"
        "print(preload.compute_capabilities())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[")


def test_bitsandbytes_is_answered_from_nvml(monkeypatch):
    from lightweight import preload

    monkeypatch.setattr(preload, "compute_capabilities", lambda: [(7, 5), (9, 0)])
    original = preload.torch.cuda.get_device_capability
    with preload._capability_from_nvml():
        assert preload.torch.cuda.get_device_capability(0) == (9, 0)
    assert preload.torch.cuda.get_device_capability is original


def test_a_function_is_compiled_once_and_when_it_is_called(monkeypatch):
    from lightweight import preload

    compiled = []
    monkeypatch.setattr(
        preload.torch, "compile", lambda function, **options: compiled.append(options) or (lambda x: -function(x))
    )
    with preload._compiling_when_called():
        negated = preload.torch.compile(lambda x: x + 1, dynamic=False)
    assert not compiled
    assert [negated(1), negated(2)] == [-2, -3]
    assert compiled == [{"dynamic": False}]


@pytest.mark.parametrize(("asked", "expected"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_threads_that_wait_sleep_unless_told_otherwise(asked, expected):
    """By what libgomp itself says that it has read."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": asked} if asked else {})
    command = [sys.executable, "-c", "from lightweight import preload"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert re.search(rf"OMP_WAIT_POLICY *= *'{expected}'", done.stderr)
