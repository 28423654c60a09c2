"""What is private to pytest is still there."""

import pytest
from _pytest.config.argparsing import Parser

from lightweight.internals import pytest as internals


def test_something_is_done_once_just_before_the_command_line_is_read():
    parser, calls = Parser(_ispytest=True), []

    def add() -> None:
        calls.append("added")
        parser.addoption("--late")

    internals.before_parsing(parser, add)
    assert calls == []
    for value in "ab":
        assert parser.parse([f"--late={value}"]).late == value
    assert calls == ["added"]


def test_a_parser_without_a_method_to_read_is_told_at_once():
    calls = []
    internals.before_parsing(object(), lambda: calls.append("added"))  # type: ignore[arg-type]
    assert calls == ["added"]


def test_names_and_destinations_of_options_are_taken_in_groups_and_outside():
    parser = Parser(_ispytest=True)
    parser.addoption("--alone", "-A", dest="by_itself")
    parser.getgroup("some").addoption("--together")
    assert internals.taken_names(parser) >= {"--alone", "-A", "by_itself", "--together", "together"}


@pytest.fixture
def mine() -> None: ...


def test_a_fixture_says_where_it_is_defined(request, mine):
    definitions = internals.fixture_definitions(request.node)
    assert definitions is not None
    (definition,) = definitions["mine"]
    assert definition.func.__module__ == __name__
    assert definition.argnames == ()


def test_a_test_can_be_given_another_id(pytester):
    item = pytester.getitem("def test_func(): pass")
    internals.rename(item, f"{item.nodeid}@group")
    assert item.nodeid.endswith("::test_func@group")
