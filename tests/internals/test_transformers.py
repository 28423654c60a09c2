"""What is private to transformers is still there."""

from types import SimpleNamespace

import pytest
import torch

from lightweight.internals import transformers as internals
from lightweight.preload import peft  # noqa: F401  # before Trainer, which imports it

import transformers  # isort: skip
from transformers.integrations import TensorBoardCallback  # isort: skip

from conftest import MICRO


def test_a_network_without_weights_gets_the_layers_of_its_quantization():
    config = transformers.AutoConfig.for_model(**MICRO.architecture)
    with torch.device("meta"):
        network = transformers.AutoModelForCausalLM.from_config(config)
        internals.quantize_shapes(network, transformers.BitsAndBytesConfig(load_in_4bit=True))
    assert network.is_quantized
    assert type(network.model.decoder.layers[0].fc1).__name__ == "Linear4bit"


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    return transformers.Trainer(torch.nn.Linear(1, 1), arguments)


def test_a_callback_can_be_called_before_all_others(trainer):
    calls = []

    class Callback(transformers.TrainerCallback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_begin(self, *_: object, **__: object) -> None:
            calls.append(self.name)

    trainer.add_callback(Callback("added"))
    internals.call_first(trainer, Callback("first"))
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert calls == ["first", "added"]


def test_tensorboards_curves_go_where_they_are_told_to_unless_the_environment_says_where(trainer, tmp_path):
    pytest.importorskip("tensorboard")
    ours, users = TensorBoardCallback(), TensorBoardCallback()
    users.logging_dir = "elsewhere"
    trainer.add_callback(ours)
    trainer.add_callback(users)
    internals.draw_curves_in(trainer, tmp_path)
    assert (ours.logging_dir, users.logging_dir) == (str(tmp_path), "elsewhere")


def test_a_bar_goes_on_from_a_step():
    progress = transformers.ProgressCallback()
    assert internals.bar_of(progress) is None
    state = SimpleNamespace(is_world_process_zero=True, max_steps=10)
    progress.on_train_begin(None, state, None)
    bar = internals.bar_of(progress)
    internals.begin_bar_at(progress, 4)
    assert (bar.initial, bar.n, bar.total) == (4, 4, 10)
    progress.on_step_end(None, SimpleNamespace(is_world_process_zero=True, global_step=6), None)
    assert bar.n == 6
    bar.close()
