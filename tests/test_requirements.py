"""Every version that pyproject.toml admits was tried: bounded below and above, and `constraints.txt` lies between."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
REQUIREMENTS = {
    requirement.name: requirement
    for requirement in map(Requirement, [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())])
    if requirement.name != PROJECT["name"]
}
each_requirement = pytest.mark.parametrize("requirement", REQUIREMENTS.values(), ids=REQUIREMENTS)


def versions(constraints: str) -> dict[str, str]:
    """The version of each package in `name==version` lines."""
    pairs = re.findall(r"^([\w.-]+)==(\S+)", constraints, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pairs}


TESTED = versions((ROOT / "constraints.txt").read_text("utf-8"))


@each_requirement
def test_a_requirement_is_bounded_on_both_sides_of_what_was_tested(requirement: Requirement) -> None:
    assert {specifier.operator for specifier in requirement.specifier} == {">=", "<"}
    assert requirement.specifier.contains(TESTED[canonicalize_name(requirement.name)])


INTERNALS = (ROOT / "lightweight" / "internals").glob("[a-z]*.py")
PRIVATE = {{"xdist": "pytest_xdist"}.get(file.stem, file.stem) for file in INTERNALS}


@each_requirement
def test_what_may_change_in_a_minor_release_is_bounded_by_the_next_one(requirement: Requirement) -> None:
    """What begins with 0, and what is reached in its private parts; anything else by the next major release."""
    major, minor = Version(TESTED[canonicalize_name(requirement.name)]).release[:2]
    (upper,) = (specifier.version for specifier in requirement.specifier if specifier.operator == "<")
    is_fickle = major == 0 or requirement.name.replace("-", "_") in PRIVATE
    assert upper == (f"{major}.{minor + 1}" if is_fickle else f"{major + 1}")


COMES_WITH = {"pyarrow": "datasets", "triton": "torch"}
"""What a requirement brings along, which alone makes use of it."""

OF_THEIR_OWN = {"unsloth", "pytest_timeout"}
"""What is asked for where somebody has installed it."""


def test_what_is_imported_is_required() -> None:
    """Else it is there by chance, in any version."""
    modules = {
        ((node.module or "") if isinstance(node, ast.ImportFrom) else name.name).partition(".")[0]
        for file in (ROOT / "lightweight").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    } - {"lightweight", *sys.stdlib_module_names, *OF_THEIR_OWN}
    distributions = {"datasets": ["datasets"], "gguf": ["gguf"], **packages_distributions()}
    needed = {COMES_WITH.get(module) or distributions[module][0] for module in modules}
    assert {canonicalize_name(name) for name in needed} <= {canonicalize_name(name) for name in REQUIREMENTS}


@each_requirement
def test_the_oldest_versions_are_the_lower_bounds(requirement: Requirement) -> None:
    """What `.ci/oldest` prints is what ci.yml installs."""
    printed = versions(subprocess.run([ROOT / ".ci" / "oldest"], capture_output=True, text=True, check=True).stdout)
    (lower,) = (specifier.version for specifier in requirement.specifier if specifier.operator == ">=")
    assert printed[canonicalize_name(requirement.name)] == lower
