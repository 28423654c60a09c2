"""Loads the options and fixtures of the experiments, as any other project can."""

pytest_plugins = ["lightweight.plugin"]
