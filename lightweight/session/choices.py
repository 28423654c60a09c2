"""What do a session's options say? Its device, target, models and methods, each read when it is first needed."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from lightweight import corpus, files, methods, models, record, targets
from lightweight.child import handle, helper, reaper, worker
from lightweight.internals import pytest_benchmark
from lightweight.methods import Method, MethodError
from lightweight.models import Model
from lightweight.session import options
from lightweight.session.options import TRUE_SIZES, TWINS
from lightweight.session.progress import Progress
from lightweight.settings import Settings, how_read
from lightweight.targets import CPU, NATIVE, T4, Device, GiB, Target
from lightweight.verdict import ratio
from lightweight.verdict.limits import LIMITS, Limits

CPU_PARAMETERS = 20_000_000
"""Of the largest model whose cells a CPU trains unless told how long: two epochs of it take a minute or two."""


class Choices:
    """What the command line asks for, and what it means on this machine. Every property raises pytest.UsageError where
    that makes no sense."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.progress = Progress(config)
        self._models: dict[str, Model] = {}
        self._folder: Path | None = None

    def check(self) -> None:
        """Whether the options make sense. Raises pytest.UsageError."""
        try:
            chosen = self.settings.applied(self.method(name) for name in self.methods)
            for name in self.models:
                record.check_searched(self.settings.learning_rate, model(name).name, *chosen)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        try:
            ratio.looks(self.option("pairs"))
        except ValueError as error:
            raise pytest.UsageError(f"--pairs: {error}") from None
        for key in ("epochs", "trial_timeout", "gpus_per_trial", "seeds", "margin"):
            value = self.option(key)
            if value is not None and value <= 0:
                raise pytest.UsageError(f"--{key.replace('_', '-')} {value:g}: give more than 0")
        for option, path in (
            ("--report", self.option("report")),
            ("--benchmark-json", pytest_benchmark.json_path(self.config)),
        ):
            try:
                if path is not None and not (place := options.place(self.config, path)).is_char_device():
                    files.check(place)
            except OSError as error:
                raise pytest.UsageError(f"{option} {path}: cannot be written ({error.strerror})") from None
        for seed in (self.seeds[0], self.seeds[-1]):
            if not 0 <= seed < 2**32:
                of_several = f" of the last of --seeds {len(self.seeds)}" * (seed != self.option("seed"))
                raise pytest.UsageError(
                    f"--seed {seed}{of_several}: give a number from 0 to {2**32 - 1}, which is what numpy takes"
                )

    def option(self, key: str) -> Any:
        """What the command line says for one of lightweight's options."""
        return options.value(self.config, key)

    @property
    def seeds(self) -> range:
        """The seeds that every cell is trained with: `--seed`'s, and with `--seeds` those after it."""
        first: int = self.option("seed")
        return range(first, first + (self.option("seeds") or 1))

    @cached_property
    def has_cuda(self) -> bool:
        """Whether trials run on a GPU."""
        import torch

        return torch.cuda.is_available()

    @cached_property
    def device(self) -> Device:
        """What trials run on, described by a child of its own."""
        if not self.has_cuda:
            machine = self.config.hook.pytest_benchmark_generate_machine_info(config=self.config)
            return Device(name=machine["cpu"].get("brand_raw") or machine["machine"])
        try:
            return helper.call_within(self.option("trial_timeout"), worker.describe_device, self.folder, 0)
        except handle.ChildError as error:
            raise pytest.UsageError(f"the GPU cannot be described: {error}") from None

    @cached_property
    def target(self) -> Target:
        """Whose memory trials get: `--target`'s, else a T4's where the GPU has as much."""
        name = self.option("target")
        if not self.has_cuda:
            if name is not None:
                raise pytest.UsageError(
                    f"--target {name}: a target caps a GPU's memory, and CUDA finds no GPU here; "
                    "leave the option out to train on the CPU"
                )
            return CPU
        card_bytes = self.device.total_bytes
        assert card_bytes is not None and T4.total_bytes is not None
        if name is None:
            suffices = card_bytes >= T4.total_bytes or not T4.emulated_on(self.device.name)
            return T4 if suffices else NATIVE.on(self.device)
        try:
            target = targets.named(name)
        except ValueError as error:
            raise pytest.UsageError(f"--target: {error}") from None
        if target.emulated_on(self.device.name) and (target.total_bytes or 0) > card_bytes:
            raise pytest.UsageError(
                f"--target {name}: needs {(target.total_bytes or 0) / GiB:.1f} GiB and {self.device.name} has "
                f"{card_bytes / GiB:.1f} GiB; choose a smaller target or native"
            )
        return target.on(self.device)

    @cached_property
    def gpus(self) -> int:
        """How many GPUs this session sees."""
        import torch

        return torch.cuda.device_count()

    @cached_property
    def world_size(self) -> int:
        """Ranks of a trial, one GPU each, or processes on a CPU."""
        wanted: int = self.option("gpus_per_trial")
        if self.has_cuda and wanted > self.gpus:
            raise pytest.UsageError(f"--gpus-per-trial {wanted}: CUDA finds {self.gpus} here; give no more than that")
        return wanted

    @cached_property
    def corpus(self) -> corpus.Corpus:
        """The examples of `--corpus`, else of `corpus.json` in pytest's root."""
        given = self.option("corpus")
        path = given or self.config.rootpath / "corpus.json"
        try:
            loaded = corpus.load(path, how_read(self.option), self.progress.show)
            if (task := self.option("task")) is not None:
                loaded = dataclasses.replace(loaded, task=corpus.load_task(task, loaded))
        except corpus.CorpusError as error:
            raise pytest.UsageError(str(error)) from None
        if given:
            self.progress.note(str(loaded.origin))
        return loaded

    @cached_property
    def models(self) -> list[str]:
        """The names of `--model`, else the original's two, or their twins without CUDA."""
        names = self.option("model") or (TRUE_SIZES if self.has_cuda else TWINS)
        return list(dict.fromkeys(names))

    @cached_property
    def methods(self) -> list[str]:
        """The names of `--method`, else all."""
        names = list(dict.fromkeys(self.option("method") or methods.METHODS))
        for name in names:
            self.method(name)
        return names

    @cached_property
    def settings(self) -> Settings:
        """What the command line sets of methods and rows."""
        try:
            return Settings.read(self.option)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None

    @cached_property
    def limits(self) -> Limits:
        """How much worse than a stored run the command line allows this one to be."""
        try:
            shares: dict[str, Any] = {limit.name: limit.value(self.option(limit.name)) for limit in LIMITS}
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        words: dict[str, Any] = {name: self.option(name) for name in ("undecided", "missing", "require_match")}
        return Limits(**shares, **words)

    def method(self, wanted: str | Method, world_size: int = 1) -> Method:
        """The method of that name, or a test's own, with what the command line sets for so many ranks. Raises
        MethodError for one of a test that says otherwise itself."""
        if isinstance(wanted, Method):
            return self.settings.apply(wanted, world_size)
        try:
            return self.settings.apply(methods.named(wanted), world_size)
        except MethodError as error:
            raise pytest.UsageError(str(error)) from None
        except ValueError as error:
            raise pytest.UsageError(f"--method: {error}") from None

    @property
    def folder(self) -> Path:
        """The session's scratch folder; removed when the session ends, and made anew where somebody has removed it."""
        if self._folder is None or not self._folder.is_dir():
            self.remove_folder()
            self._folder = reaper.own.make_folder()
        return self._folder

    def remove_folder(self) -> None:
        """Remove the scratch folder, if there is one."""
        if self._folder is not None:
            reaper.own.remove_folder(self._folder)

    def find(self, wanted: Model) -> Model:
        """The model with where its weights come from, looked for once a session."""
        if wanted.name not in self._models:
            try:
                self._models[wanted.name], note = models.find(wanted, self.option("weights"))
            except models.ModelError as error:
                raise pytest.UsageError(str(error)) from None
            if note:
                self.progress.note(note)
        return self._models[wanted.name]

    def takes_long(self, name: str) -> bool:
        """Whether a model's cells take many minutes each here: a CPU and a model of true size, and nobody has said by
        `--epochs` how long to train."""
        if self.has_cuda or self.option("epochs"):
            return False
        import torch

        try:
            network = models.skeleton(models.configuration(self.find(model(name))), torch.float32, None)
        except models.ModelError as error:
            raise pytest.UsageError(str(error)) from None
        return models.count_parameters(network) > CPU_PARAMETERS


def model(wanted: str | Model) -> Model:
    """The model of that name. Raises pytest.UsageError."""
    try:
        return models.named(wanted) if isinstance(wanted, str) else wanted
    except models.ModelError as error:
        raise pytest.UsageError(str(error)) from None
