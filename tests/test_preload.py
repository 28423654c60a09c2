import importlib.machinery
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

LOADERS = [importlib.machinery.SourceFileLoader, importlib.machinery.ExtensionFileLoader]


def test_importing_it_leaves_torchs_own_answers_in_place():
    program = (
        "import torch; original, compile = torch.cuda.get_device_capability, torch.compile\n"
        "from lightweight import preload\n"
        "assert torch.cuda.get_device_capability is original and torch.compile is compile\n"
        "assert not torch.cuda.is_initialized()\n"
        "import sys; assert 'bitsandbytes' in sys.modules and 'pytest' not in sys.modules\n"
        "assert 'torch._inductor.lowering' not in sys.modules, 'the compiler was loaded for nothing'\n"
        "print(preload.gpus())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[")


def test_what_imports_ask_of_gpus_nvml_answers(monkeypatch):
    """torchao asks through torch's compiler, which keeps the answer: it must ask anew when it compiles."""
    from torch._dynamo import device_interface

    from lightweight import preload

    cuda = preload.torch.cuda
    known = [preload.Gpu("small", 2**30, 7, 5), preload.Gpu("large", 2**36, 9, 0)]
    monkeypatch.setattr(preload, "gpus", lambda: known)
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda, "_lazy_init", lambda: pytest.fail("torch was asked, which initialises CUDA"))
    monkeypatch.setattr(device_interface, "caching_worker_device_properties", {})
    monkeypatch.setattr(device_interface, "caching_worker_current_devices", {})
    names = ("get_device_capability", "get_device_properties", "current_device", "get_device_name")
    originals = [getattr(cuda, name) for name in names]
    with preload._answered_by_nvml():
        assert cuda.get_device_capability(0) == (9, 0)
        assert device_interface.CudaInterface.Worker.get_device_properties().major == 9
        assert (cuda.get_device_name(), cuda.get_device_properties(0).total_memory) == ("large", 2**36)
        assert device_interface.caching_worker_device_properties
    assert not device_interface.caching_worker_device_properties
    assert [getattr(cuda, name) for name in names] == originals


@pytest.mark.parametrize(("asked", "expected"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_threads_that_wait_sleep_unless_told_otherwise(asked, expected):
    """By what libgomp itself says that it has read."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": asked} if asked else {})
    # what is imported after torch, with peft, takes longer, and reads nothing of it
    program = "import contextlib, sys; sys.modules['peft'] = None\n"
    program += "with contextlib.suppress(ImportError): from lightweight import preload"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert re.search(rf"OMP_WAIT_POLICY *= *'{expected}'", done.stderr)


def test_one_gpu_that_does_not_answer_costs_its_own_capability(monkeypatch):
    from lightweight import preload

    def answer(index):
        if index == 1:
            raise preload.pynvml.NVMLError(preload.pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    monkeypatch.setattr(preload.pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(preload.pynvml, "nvmlShutdown", lambda: answer(1))
    monkeypatch.setattr(preload.pynvml, "nvmlDeviceGetCount", lambda: 3)
    monkeypatch.setattr(preload.pynvml, "nvmlDeviceGetHandleByIndex", answer)
    monkeypatch.setattr(preload.pynvml, "nvmlDeviceGetCudaComputeCapability", lambda handle: [7 + handle, 0])
    monkeypatch.setattr(preload.pynvml, "nvmlDeviceGetName", str)
    monkeypatch.setattr(preload.pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(total=2**30))
    assert preload.gpus() == [preload.Gpu("0", 2**30, 7, 0), preload.Gpu("2", 2**30, 9, 0)]
    monkeypatch.setattr(preload.pynvml, "nvmlDeviceGetCount", lambda: answer(1))
    assert preload.gpus() == []


def test_what_initialises_cuda_is_named_and_an_open_device_is_not_that(tmp_path, monkeypatch):
    """The innermost module whose import does. NVML, too, opens the driver's devices."""
    import torch

    from lightweight.child import nursery

    monkeypatch.setattr(torch.cuda, "_initialized", False)
    (tmp_path / "outer_one.py").write_text("import inner_one\n")
    (tmp_path / "inner_one.py").write_text("import torch\ntorch.cuda._initialized = True\n")
    (tmp_path / "broken_one.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    originals = [loader.exec_module for loader in LOADERS]
    assert nursery.load(["json", "broken_one"]) is None
    assert nursery.load(["broken_one", "outer_one", "nowhere"]) == "inner_one"
    assert [loader.exec_module for loader in LOADERS] == originals
    assert nursery.load([]) == "a module before the first of lightweight's own"
    for name in ("inner_one", "outer_one"):
        del sys.modules[name]


def test_in_a_fork_of_what_has_initialised_cuda_torch_is_asked_for_more(monkeypatch):
    """Another package may have started the forkserver, with a preload that does: torch says of its children that CUDA
    is not initialised, and raises only when it is used."""
    import torch

    from lightweight.child import nursery

    monkeypatch.setattr(torch.cuda, "_initialized", False)
    assert nursery.load([]) is None
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    assert not torch.cuda.is_initialized()
    assert nursery.load([]) == "a module before the first of lightweight's own"
