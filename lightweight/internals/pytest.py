"""What is private to pytest: the options of others, a test's fixtures, and its id. Read in pytest 9.1.1 and 9.2.0."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest


def before_parsing(parser: pytest.Parser, act: Callable[[], None]) -> None:
    """Call `act` just before `parser` reads the command line for good; now, where a pytest does that by another name.

    No hook comes so late: `pytest_addoption` of a conftest.py is called after that of every plugin.
    """
    original = getattr(parser, "parse", None)
    if original is None:
        act()
        return

    def parse(*args: Any, **kwargs: Any) -> Any:
        del parser.parse  # which hides pytest's own
        act()
        return original(*args, **kwargs)

    parser.parse = parse  # type: ignore[method-assign]


def taken_names(parser: pytest.Parser) -> set[str]:
    """Names and destinations of everybody's options, as far as `parser` has them where they were; it lists them to
    nobody, and refuses one that is added twice only in the group that comes second."""
    groups: Sequence[Any] = [*getattr(parser, "_groups", ()), getattr(parser, "_anonymous", None)]
    options = [option for group in groups for option in getattr(group, "options", ())]
    names = {name for option in options for name in getattr(option, "names", tuple)()}
    return names | {getattr(option, "dest", "") for option in options}


def fixture_definitions(node: pytest.Item) -> Mapping[str, Sequence[Any]] | None:
    """The definitions of each fixture of a test, the one that is used last; None where a pytest keeps them elsewhere.
    `fixturenames` has names alone, which do not say whose a fixture is."""
    definitions: Mapping[str, Sequence[Any]] | None = getattr(
        getattr(node, "_fixtureinfo", None), "name2fixturedefs", None
    )
    return definitions


def rename(item: pytest.Item, nodeid: str) -> None:
    """Give `item` another id, which pytest makes when it collects and lets nobody set. Before 9.2 it is a text."""
    private: Any = item
    if hasattr(private, "_id"):
        private._id = type(private._id).parse(nodeid)
    else:
        private._nodeid = nodeid
