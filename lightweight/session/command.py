"""Which command trains the same trials again? The tests and options of a session, as arguments of pytest.

Only what says which trials are trained and how; where things are written, what they are held against and how they are
shown is each session's own. Places are told from pytest's root: a record is shared, and whose machine it was is
nobody's business.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lightweight.session import options

OF_A_SESSION = {"report", "require_match", "missing", "undecided", "trial_timeout", "false_alarms", "pilot"}
"""Options that say nothing of the trials."""


def command(config: pytest.Config) -> list[str]:
    """The arguments after `pytest`."""
    limits = {limit.name for limit in options.LIMITS}
    said = [_from_root(config, argument) for argument in config.args]
    said = [] if said == ["."] else said
    for option in options.OPTIONS:
        value = options.value(config, option.key)
        if option.key in OF_A_SESSION | limits or value == option.settings.get("default"):
            continue
        for one in value if isinstance(value, list) else [value]:
            is_file = isinstance(one, Path) or (option.key == "method" and ".py:" in one)
            is_file = is_file or (option.key in ("held_out", "learning_rate") and Path(str(one)).is_file())
            of_option = _from_root(config, str(one)) if is_file else str(one)
            said.append(f"--{option.name}" if one is True else f"--{option.name}={of_option}")
    for flag, key in (("-k", "keyword"), ("-m", "markexpr")):
        if words := config.getoption(key, ""):
            said += [flag, words]
    return said


def _from_root(config: pytest.Config, argument: str) -> str:
    """A path, or a test in a file, as it is called from pytest's root; by its name alone where it is elsewhere."""
    place, colons, test = argument.partition("::" if "::" in argument else ".py:")
    place, colons = (f"{place}.py", ":") if colons == ".py:" else (place, colons)
    if place.startswith("hub:"):
        return argument
    path = (config.invocation_params.dir / place).resolve()
    root = config.rootpath.resolve()
    inside = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    return f"{inside}{colons}{test}"
