"""What is imported for as long as a process lives is not looked through for garbage."""

import gc
import subprocess
import sys
from contextlib import suppress

import pytest

from lightweight.imports import without_collecting


def test_without_collecting_leaves_the_collector_as_it_was():
    assert gc.isenabled()
    with suppress(ImportError), without_collecting():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collecting():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


COUNT = """
import gc, sys

passes = []
gc.callbacks.append(lambda phase, info: passes.append(info["generation"]) if len(sys.modules) > 1000 else None)
{imports}
assert not passes, passes
assert len(sys.modules) > 1000 and gc.isenabled()
if {is_ours}:
    assert gc.get_freeze_count() > 100_000
gc.callbacks.clear()

class Garbage:
    def __del__(self):
        print("looked through at the end")

Garbage.itself = Garbage()
del Garbage
"""


@pytest.mark.parametrize(
    ("imports", "is_ours"),
    [
        ("import lightweight.child.nursery", True),
        ("from lightweight.imports import for_good\nwith for_good():\n    import lightweight.cli.train", True),
        (
            "from lightweight.imports import without_collecting\n"
            "with without_collecting():\n    import lightweight.session.laboratory\n    gc.callbacks.clear()",
            False,
        ),
    ],
    ids=["forkserver", "train", "a guest in pytest"],
)
def test_what_is_imported_is_not_looked_through_until_the_end(imports, is_ours):
    """Neither while it comes, nor when the process ends; a guest's host finds its own garbage as before."""
    program = COUNT.format(imports=imports, is_ours=is_ours)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
