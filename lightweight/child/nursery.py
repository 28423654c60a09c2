"""What the forkserver imports, so that its children are born with it; and whether that has touched the GPU.

A fork of a process that has initialised CUDA can never use it. Nothing here does, but an import reaches into every
package that is installed, and some ask the device for its properties while they are imported. So every import is
watched: the first module after which CUDA is initialised is named, and children then get fresh interpreters instead.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from lightweight.imports import for_good

MODULES = (
    "lightweight.preload",  # first: it keeps the imports after it off the GPU
    "lightweight.child.worker",
    "lightweight.forecast.tracer",
    # transformers imports these lazily, in every child anew, unless the forkserver has them already
    "transformers.integrations.bitsandbytes",
    "transformers.models.byt5.tokenization_byt5",
    "transformers.models.gpt_neo.modeling_gpt_neo",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
    "triton.experimental.gluon",  # Triton's own lazy import, where there is Triton
)


def touches_cuda() -> bool:
    """Whether torch has initialised CUDA in this process, which is what makes it refuse CUDA in a fork of it. That the
    driver's devices are open says nothing: NVML opens them, too."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return cuda is not None and bool(cuda.is_initialized())


def _is_fork_without_cuda() -> bool:
    """Whether this is a fork of a process that had initialised CUDA, of which torch says there that it is not: a
    forkserver that another package started, with a preload of its own."""
    if "torch" not in sys.modules:
        return False
    from lightweight.internals.torch import is_fork_without_cuda

    return is_fork_without_cuda()


def load(modules: Sequence[str]) -> str | None:
    """Import `modules`. The one of them, or of what they import, that has initialised CUDA, or None."""
    with _watching() as touched, for_good():
        for name in modules:
            # Whatever is wrong with a package is told where it is used: in the child that imports it again.
            with suppress(Exception):
                importlib.import_module(name)
    return touched[0] if touched else None


@contextmanager
def _watching() -> Iterator[list[str]]:
    """A list to which the name of the first module is added after whose execution CUDA is initialised. Modules that are
    imported by others are done before them, so that it is the innermost."""
    touched: list[str] = []
    if touches_cuda() or _is_fork_without_cuda():
        touched.append("a module before the first of lightweight's own")
    loaders = [importlib.machinery.SourceFileLoader, importlib.machinery.ExtensionFileLoader]
    originals = [(loader, loader.exec_module, "exec_module" in vars(loader)) for loader in loaders]

    def watched(original: Callable[..., None]) -> Callable[..., None]:
        def exec_module(loader: Any, module: Any) -> None:
            try:
                original(loader, module)
            finally:
                if not touched and touches_cuda():
                    touched.append(module.__name__)

        return exec_module

    for loader, original, _ in originals:
        loader.exec_module = watched(original)  # type: ignore[method-assign]
    try:
        yield touched
    finally:
        for loader, original, is_its_own in originals:
            if is_its_own:
                loader.exec_module = original  # type: ignore[method-assign]
            else:
                del loader.exec_module


culprit = load(MODULES)
"""The module that has touched the GPU in this process while it was imported here, or None."""
