"""What is private in Triton: read in 3.6 and 3.7."""

from __future__ import annotations

from typing import Any


def build_launcher(compiled: Any) -> None:
    """Build what launches a compiled kernel, with the C compiler, which else waits for the first launch.
    triton/compiler/compiler.py, `CompiledKernel`."""
    compiled._init_handles()
