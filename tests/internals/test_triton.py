import inspect

import pytest

from lightweight.internals import triton as triton_internals

compiler = pytest.importorskip("triton.compiler")


def test_a_compiled_kernel_builds_its_launcher_when_it_is_told():
    built = []

    class Compiled:
        _init_handles = lambda self: built.append(self)  # noqa: E731

    assert not [name for name in inspect.signature(compiler.CompiledKernel._init_handles).parameters if name != "self"]
    triton_internals.build_launcher(Compiled())
    assert len(built) == 1
