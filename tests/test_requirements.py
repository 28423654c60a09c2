"""Every version that pyproject.toml admits was tried: bounded below and above, and `constraints.txt` lies between."""

import re
import subprocess
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


@each_requirement
def test_the_oldest_versions_are_the_lower_bounds(requirement: Requirement) -> None:
    """What `.ci/oldest` prints is what ci.yml installs."""
    printed = versions(subprocess.run([ROOT / ".ci" / "oldest"], capture_output=True, text=True, check=True).stdout)
    (lower,) = (specifier.version for specifier in requirement.specifier if specifier.operator == ">=")
    assert printed[canonicalize_name(requirement.name)] == lower
