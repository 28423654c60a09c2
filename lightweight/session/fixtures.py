"""Which tests use lightweight's fixtures? `lightweight.plugin` defines them, whether a test asks for one is here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from lightweight.internals.pytest import fixture_definitions

PLUGIN = "lightweight.plugin"
"""The module that defines the fixtures."""
TRAINING_FIXTURES = ("train", "outcome_of", "speedup")
FIXTURES = (*TRAINING_FIXTURES, "forecast_of")
SEED = "lightweight_seed"
"""The fixture that says with which of its seeds a test trains."""
NOT_RUN = "not run: "
"""How the reason of a skip begins that the session's end lists as not run."""


def uses(node: pytest.Item, names: Sequence[str]) -> bool:
    """Whether a test uses one of lightweight's fixtures `names`, and not another's of that name."""
    if not any(name in getattr(node, "fixturenames", ()) for name in names):
        return False
    definitions = fixture_definitions(node)
    if definitions is None:  # nothing says whose they are
        return True
    return any(_is_ours(name, definitions.get(name, ())) for name in names)


def _is_ours(name: str, definitions: Sequence[Any]) -> bool:
    """Of the definitions of a fixture the last one is used, and one before it where that asks for it by name."""
    for definition in reversed(definitions):
        if getattr(definition.func, "__module__", None) == PLUGIN:
            return True
        if name not in definition.argnames:
            return False
    return False
