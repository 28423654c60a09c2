import subprocess
import sys


def test_importing_it_leaves_torchs_own_answers_in_place():
    program = (
        "import torch; original = torch.cuda.get_device_capability\n"
        "from lightweight import preload\n"
        "assert torch.cuda.get_device_capability is original\n"
        "assert not torch.cuda.is_initialized()\n"
        "import sys; assert 'bitsandbytes' in sys.modules and 'pytest' not in sys.modules\n"
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
