"""Are the kernels of our own run here, and when are they compiled? `kernels` says what each takes and gives back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from lightweight.internals.triton import build_launcher

try:
    from lightweight.captured import triton_flash, triton_joined, triton_kernels, triton_rotary
except ImportError:  # no Triton
    triton_kernels = None  # type: ignore[assignment]

Launched = Callable[[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
"""Is told of a launch: the kernel's name, its programs, arguments and settings."""

_asked_for: dict[object, tuple[str, tuple[object, ...], dict[str, Any]]] | None = None
_computes = True
_are_drawn = False
_tell: Launched | None = None
_started: Future[None] | None = None


def take(x: torch.Tensor) -> bool:
    """Whether `x` is computed with here, and not by torch."""
    return not _computes or (triton_kernels is not None and x.is_cuda)


def compute() -> bool:
    """Whether tensors have content, or shapes alone."""
    return _computes


@contextlib.contextmanager
def shapes_alone(*, drawn: bool = False) -> Iterator[None]:
    """Inside, tensors of every device are taken, and what is given back has a shape and no content: nothing is
    launched, and no Triton is needed. A forecast sees what is allocated. `drawn`: whether the weights will be as an
    initialisation draws them."""
    global _computes, _are_drawn
    _computes, _are_drawn = False, drawn
    try:
        yield
    finally:
        _computes, _are_drawn = True, False


def are_even(scales: torch.Tensor, spread: float) -> bool:
    """Whether the largest of a norm's `scales` is at most `spread` times the smallest. Those that have no numbers are
    if they will be drawn, since initialisations make them all one."""
    if not _computes:
        return _are_drawn
    sizes = scales.detach().float().abs()
    return bool(sizes.max() <= spread * sizes.min())


@contextlib.contextmanager
def launches_told_to(tell: Launched) -> Iterator[None]:
    """Inside, `tell` is told of every launch."""
    global _tell
    _tell = tell
    try:
        yield
    finally:
        _tell = None


def launch_again(name: str, programs: tuple[int, ...], arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
    """Have a launch that was told of repeated, on the same tensors."""
    launch(name, programs, *arguments, **settings)


def warm_up() -> None:
    """Start Triton, where there is one, in a thread, beside whatever else there is to be done: what it reads, hashes
    and builds for itself takes a second of a process's first kernel."""
    global _started
    if triton_kernels is None:
        return
    thread = _threads(1)
    types = (torch.float16, torch.uint8, torch.float16, 16)
    _started = thread.submit(_compile, "relu_backward", types, {"elements": 8})
    thread.shutdown(wait=False)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Inside, no kernel is launched, and what was to be written is left as it was; leaving compiles all that would have
    been launched, at once, in threads: Triton compiles what it first meets one after the other."""
    global _asked_for
    _asked_for = {}
    try:
        yield
        jobs = [*_asked_for.values()]
    finally:
        _asked_for = None
    if _started is not None:
        _started.result()
    with _threads(len(jobs)) as threads:
        for job in [threads.submit(_compile, *job) for job in jobs]:
            job.result()


def _threads(count: int) -> ThreadPoolExecutor:
    """Each with this thread's current device as its own."""
    if not torch.cuda.is_available():
        return ThreadPoolExecutor(max(1, count))
    device = torch.cuda.current_device()
    return ThreadPoolExecutor(max(1, count), initializer=torch.cuda.set_device, initargs=(device,))


def _kernel(name: str) -> Any:
    of = next(
        module for module in (triton_rotary, triton_flash, triton_joined, triton_kernels) if hasattr(module, name)
    )
    return getattr(of, name)


def _compile(name: str, types: tuple[object, ...], settings: dict[str, Any]) -> None:
    compiled = _kernel(name).warmup(*types, grid=(1,), **settings)
    if compiled is not None:  # as it is where kernels are interpreted
        build_launcher(compiled)


def launch(name: str, programs: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Have `programs` of the kernel called `name`, in one of the modules of such, run on the device."""
    if _tell is not None:
        _tell(name, programs, arguments, settings)
    if not _computes:
        return
    kernel = _kernel(name)
    if _asked_for is None:
        kernel[programs](*arguments, **settings)
        return
    types = tuple(argument.dtype if isinstance(argument, torch.Tensor) else argument for argument in arguments)
    varying = getattr(kernel, "do_not_specialize", None) or ()
    key = (
        name,
        *(value for parameter, value in zip(kernel.arg_names, types, strict=False) if parameter not in varying),
        *sorted(settings.items()),
    )
    _asked_for[key] = name, types, settings
