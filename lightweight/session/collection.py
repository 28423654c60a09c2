"""Which cells does a session train, and can they be trained? Asked while tests are collected, before any is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest

from lightweight import names
from lightweight.methods import Method, MethodError
from lightweight.models import Model, first_line
from lightweight.record import BASELINE
from lightweight.session import choices, xdist_bridge
from lightweight.session.choices import Choices
from lightweight.session.fixtures import FIXTURES, NOT_RUN, SEED, TRAINING_FIXTURES, uses
from lightweight.session.ledger import Ledger
from lightweight.trial import Trial

LOOKS_ONLY = ("collectonly", "showfixtures", "show_fixtures_per_test", "setupplan")
"""pytest's options by which tests are shown and none is run."""


class Collection:
    """What the session's options make of the tests that use its fixtures."""

    def __init__(self, chosen: Choices, ledger: Ledger) -> None:
        self.chosen, self.ledger, self.config = chosen, ledger, chosen.config

    def parametrize(self, metafunc: pytest.Metafunc) -> None:
        """Give a test that takes `model` and `method`, and a fixture of lightweight's, the session's own."""
        marked: set[str] = set()
        for mark in metafunc.definition.iter_markers("parametrize"):
            argnames = mark.kwargs.get("argnames", mark.args[0] if mark.args else ())
            marked |= {name.strip() for name in (argnames.split(",") if isinstance(argnames, str) else argnames)}
        cells = {"model": self.chosen.models, "method": self.chosen.methods}
        if "speedup" in metafunc.fixturenames:
            cells["method"] = [name for name in self.chosen.methods if name != BASELINE]
            if not (self.chosen.has_cuda or self.chosen.option("model") or self.chosen.option("method")):
                # On a CPU a ratio says nothing of a GPU: one of them shows how it is measured.
                cells = {argument: values[:1] for argument, values in cells.items()}
        for argument, values in cells.items():
            if argument in metafunc.fixturenames and argument not in marked:
                metafunc.parametrize(argument, values)
        is_cell = {*cells, SEED} <= set(metafunc.fixturenames)
        if is_cell and len(self.chosen.seeds) > 1:
            metafunc.parametrize(SEED, self.chosen.seeds, indirect=True, ids=lambda seed: f"seed{seed}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Cells are trained, and timed, before the tests that only look at how they ended, and a model's are kept
        together where workers share the tests. What is of another model than those named is left out."""
        items.sort(key=lambda item: uses(item, ("outcome_of", "speedup")))
        named = {choices.model(name).name for name in self.chosen.models} if self.chosen.option("model") else None
        others = []
        for item in items:
            if uses(item, FIXTURES):
                self.ledger.is_used = True
                model = _model_of(item)
                xdist_bridge.group_by_model(item, model)
                if named is not None and model is not None and model not in named:
                    others.append(item)
        if others:
            items[:] = [item for item in items if item not in others]
            self.config.hook.pytest_deselected(items=others)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Check everything a trial needs, before any model is built."""
        if any(self.config.getoption(only, False) for only in LOOKS_ONLY):
            return
        items = [item for item in session.items if uses(item, TRAINING_FIXTURES)]
        if self.ledger.is_used and not self.config.pluginmanager.has_plugin("benchmark"):
            raise pytest.UsageError("lightweight's tests are timed by pytest-benchmark: leave out -p no:benchmark")
        items = [item for item in items if not self._says_otherwise(item)]
        self._refuse_namesakes(items)
        for item in items:
            settings: dict[str, Any] = {
                "target": self.chosen.target,
                "corpus": self.chosen.corpus,
                "world_size": self.chosen.world_size,
                "placement": self.chosen.settings.placement or "replicated",
                **self.chosen.settings.rows,
            }
            # Only cells that are going to run: looking for a model may download it.
            cell = _arguments(item)
            model, method = cell.get("model"), cell.get("method")
            known = isinstance(model, str | Model)
            located = self.chosen.find(choices.model(model)) if known else Model(name="any")  # type: ignore[arg-type]
            if isinstance(method, str | Method):
                try:
                    scaled = self.chosen.method(method, self.chosen.world_size)
                    _check_crossing(Trial(model=located, method=scaled, **settings))
                except ValueError as error:
                    raise pytest.UsageError(str(error)) from None
        is_ours = any(uses(item, FIXTURES) for item in session.items)
        if is_ours and (problem := xdist_bridge.unclaimed(self.config)) is not None:
            raise pytest.UsageError(problem)

    def _says_otherwise(self, item: pytest.Item) -> bool:
        """Whether a method that a test brings says itself what the command line says otherwise. It will not be run,
        and the laboratory says why."""
        try:
            for value in _arguments(item).values():
                if isinstance(value, Method):
                    self.chosen.method(value)
        except MethodError:
            return True
        return False

    def _refuse_namesakes(self, items: Sequence[pytest.Item]) -> None:
        """Two different methods, or models, of one name could not be told apart afterwards. Raises
        pytest.UsageError."""
        used: dict[str, list[Method | Model]] = {"method": [], "model": []}
        for item in items:
            arguments = _arguments(item)
            used["method"] += [self.chosen.method(value) for value in arguments.values() if isinstance(value, Method)]
            used["method"] += [self.chosen.method(n) for n in [arguments.get("method")] if isinstance(n, str)]
            used["model"] += [value for value in arguments.values() if isinstance(value, Model)]
            used["model"] += [choices.model(n) for n in [arguments.get("model")] if isinstance(n, str)]
        for kind, things in used.items():
            try:
                names.refuse_namesakes(kind, things)
            except ValueError as error:
                raise pytest.UsageError(str(error)) from None

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.get_closest_marker("needs_cuda") and not self.chosen.has_cuda:
            pytest.skip(f"{NOT_RUN}needs CUDA")
        for mark in item.iter_markers("needs_gpus"):
            if self.chosen.gpus < mark.args[0]:
                pytest.skip(f"{NOT_RUN}needs {mark.args[0]} GPUs")


def _model_of(item: pytest.Item) -> str | None:
    """The name of the model that a test is of: its mark's, else its argument's."""
    if (mark := item.get_closest_marker("model")) is not None:
        return str(mark.args[0])
    model = _arguments(item).get("model")
    return choices.model(model).name if isinstance(model, str | Model) else None


def _arguments(item: pytest.Item) -> Mapping[str, object]:
    """What a test is parametrized with."""
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


def _check_crossing(trial: Trial) -> None:
    """Whether `trial` can be sent to a child. Raises ValueError, which names the field that cannot."""
    try:
        ForkingPickler.dumps(trial)
    except Exception as error:  # noqa: BLE001  pickling runs code of what is pickled
        field = next((path for path, value in _parts(trial.method) if not _can_cross(value)), "it")
        raise ValueError(
            f"method {trial.method.name}: its {field} cannot be sent to a child process ({first_line(error)}): give "
            "what can be pickled, such as a function of a module"
        ) from None


def _parts(method: Method) -> Iterator[tuple[str, Any]]:
    """The settings of `method` by name, the smallest first."""
    for name, value in method.training_arguments.items():
        yield f"training_arguments[{name!r}]", value
    for name in ("adapter", "quantization"):
        config = getattr(method, name)
        for key, value in vars(config).items() if config is not None else ():
            yield f"{name}.{key}", value
    for field in dataclasses.fields(method):
        yield field.name, getattr(method, field.name)


def _can_cross(value: Any) -> bool:
    try:
        ForkingPickler.dumps(value)
    except Exception:  # noqa: BLE001  pickling runs code of what is pickled
        return False
    return True
