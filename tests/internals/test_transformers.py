from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from lightweight import preload  # isort: skip  # noqa: F401  # before Trainer, which imports peft
import transformers
from transformers import AutoModelForCausalLM, OPTConfig, Trainer, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.masking_utils import create_causal_mask
from transformers.models.llama import LlamaConfig

from conftest import MICRO
from lightweight.internals import transformers as transformers_internals
from lightweight.internals.transformers import TrainerHooks

CONFIG = OPTConfig(
    vocab_size=16, hidden_size=8, ffn_dim=8, word_embed_proj_dim=8, num_hidden_layers=1, num_attention_heads=2
)
ROW = {"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [1, 2]}


class Hooked(TrainerHooks, Trainer):
    """Notes which hooks the Trainer calls."""

    def __init__(self, **arguments):
        self.called = []
        super().__init__(**arguments)

    def run_epoch(self, model, epoch, *arguments, **options):
        self.called.append(("run_epoch", epoch))
        super().run_epoch(model, epoch, *arguments, **options)

    def train_sampler(self, train_dataset=None):
        self.called.append("train_sampler")
        return super().train_sampler(train_dataset)

    def write_weights(self, output_dir=None, state_dict=None):
        self.called.append("write_weights")
        super().write_weights(output_dir, state_dict)


@pytest.fixture
def trainer(tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=1
    )
    return Hooked(model=AutoModelForCausalLM.from_config(CONFIG), args=arguments, train_dataset=[ROW] * 2)


def test_the_trainer_calls_every_hook(trainer, tmp_path):
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert trainer.called == ["train_sampler", ("run_epoch", 0), "write_weights"]
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_a_checkpoint_has_weights_and_what_random_numbers_come_next(trainer, tmp_path):
    transformers_internals.save_in_checkpoint(trainer, tmp_path / "weights")
    assert (tmp_path / "weights" / "model.safetensors").is_file()
    transformers_internals.save_random_numbers(trainer, tmp_path)
    expected = torch.rand(3)
    transformers_internals.load_random_numbers(trainer, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_a_trainer_computes_losses_where_it_is_told_and_trains_on_what_it_is_fed(trainer):
    entered = []
    batch = {name: torch.tensor([values]) for name, values in ROW.items()}
    transformers_internals.feed(trainer, [batch])
    with transformers_internals.losses_computed_in(trainer, lambda: entered.append(1) or nullcontext()):
        trainer.train()
    assert entered == [1] and trainer.state.global_step == 1
    assert "train_sampler" not in trainer.called


def test_a_model_says_its_attention_and_its_layers():
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="eager")
    assert transformers_internals.attention_of(model) == "eager"
    transformers_internals.say_attention(model, "sdpa")
    assert transformers_internals.attention_of(model.model.decoder) == "sdpa"
    assert transformers_internals.layers_not_split(model) == {"OPTDecoderLayer"}


def test_what_turns_queries_and_keys_is_replaced_and_given_back():
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    network = AutoModelForCausalLM.from_config(config)
    attention = network.model.layers[0].self_attn
    own, replace = transformers_internals.rotation_of(attention)
    calls = []
    undo = replace(lambda *arguments, **options: calls.append(1) or own(*arguments, **options))
    network(torch.tensor([[1, 2, 3]]))
    undo()
    network(torch.tensor([[1, 2, 3]]))
    assert calls == [1] and transformers_internals.rotation_of(attention)[0] is own
    assert transformers_internals.rotation_of(torch.nn.Linear(1, 1))[0] is None


def test_layers_are_computed_again_until_that_is_undone():
    network = AutoModelForCausalLM.from_config(CONFIG)
    layers = transformers_internals.recomputable_layers(network)
    assert [type(layer).__name__ for layer in layers] == ["OPTDecoderLayer"] * CONFIG.num_hidden_layers
    passes = []
    layers[0].fc1.register_forward_hook(lambda *_: passes.append(1))

    def step():
        passes.clear()
        network.train()(torch.tensor([[1, 2, 3]])).logits.sum().backward()
        return len(passes)

    undo = transformers_internals.recompute(layers, keeps_random_numbers=True)
    assert step() == 2
    undo()
    assert step() == 1


def test_what_stands_in_for_a_layers_forward_pass_is_called_as_that_is():
    """By what `called_by` has given the layer, in training alone, and once: 5.17 and 5.23 do so in different places."""
    network = AutoModelForCausalLM.from_config(CONFIG)
    layer, *_ = transformers_internals.recomputable_layers(network)
    own, calls = layer.forward, []

    def by(function, *arguments):
        calls.append("by" if "attention_mask" in function.keywords else "without what it takes by name")
        return function(*arguments)

    def forward(*arguments, **options):
        calls.append("forward")
        return own(*arguments)

    layer.forward = transformers_internals.standing_in(layer, forward)
    undo = transformers_internals.called_by({layer: by})
    ids = torch.tensor([[1, 2, 3]])
    network.train()(ids)
    assert calls[:2] == ["by", "forward"]
    assert calls.count("forward") == 1
    calls.clear()
    network.eval()(ids)
    assert calls == ["forward"]
    undo()
    calls.clear()
    network.train()(ids)
    assert calls == ["forward"]


def test_whether_a_mask_says_more_than_causality_is_decided_elsewhere():
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="sdpa")
    padding = torch.tensor([[1, 1, 0]])
    asked = []

    def ignored(own, padding_mask, *arguments, **options):
        asked.append(padding_mask)
        return own(None, *arguments, **options)

    def mask():
        embeds = torch.zeros(1, 3, 8)
        return create_causal_mask(model.config, embeds, padding, past_key_values=None)

    assert mask() is not None
    with transformers_internals.causal_masks_ignored_by(ignored):
        assert mask() is None
    assert mask() is not None and len(asked) == 1


def test_a_network_without_weights_gets_the_layers_of_its_quantization():
    config = transformers.AutoConfig.for_model(**MICRO.architecture)
    with torch.device("meta"):
        network = transformers.AutoModelForCausalLM.from_config(config)
        transformers_internals.quantize_shapes(network, transformers.BitsAndBytesConfig(load_in_4bit=True))
    assert network.is_quantized
    assert type(network.model.decoder.layers[0].fc1).__name__ == "Linear4bit"


@pytest.fixture
def plain(tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    return transformers.Trainer(torch.nn.Linear(1, 1), arguments)


def test_a_callback_can_be_called_before_all_others(plain):
    calls = []

    class Callback(transformers.TrainerCallback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_begin(self, *_: object, **__: object) -> None:
            calls.append(self.name)

    plain.add_callback(Callback("added"))
    transformers_internals.call_first(plain, Callback("first"))
    plain.callback_handler.on_train_begin(plain.args, plain.state, plain.control)
    assert calls == ["first", "added"]


def test_tensorboards_curves_go_where_they_are_told_to_unless_the_environment_says_where(plain, tmp_path):
    pytest.importorskip("tensorboard")
    ours, users = TensorBoardCallback(), TensorBoardCallback()
    users.logging_dir = "elsewhere"
    plain.add_callback(ours)
    plain.add_callback(users)
    transformers_internals.draw_curves_in(plain, tmp_path)
    assert (ours.logging_dir, users.logging_dir) == (str(tmp_path), "elsewhere")


def test_a_bar_goes_on_from_a_step():
    progress = transformers.ProgressCallback()
    assert transformers_internals.bar_of(progress) is None
    state = SimpleNamespace(is_world_process_zero=True, max_steps=10)
    progress.on_train_begin(None, state, None)
    bar = transformers_internals.bar_of(progress)
    transformers_internals.begin_bar_at(progress, 4)
    assert (bar.initial, bar.n, bar.total) == (4, 4, 10)
    progress.on_step_end(None, SimpleNamespace(is_world_process_zero=True, global_step=6), None)
    assert bar.n == 6
    bar.close()


def test_weights_that_are_loaded_one_by_one_are_in_no_common_block(tmp_path, monkeypatch):
    blocks = []
    monkeypatch.setattr("transformers.modeling_utils.caching_allocator_warmup", lambda *_, **__: blocks.append(1))
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert blocks == [1]
    with transformers_internals.loaded_one_by_one():
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert blocks == [1]


def test_what_recomputing_calls_is_called_again_in_the_backward_pass():
    calls = []
    given = torch.ones(2, requires_grad=True)
    again = transformers_internals.recomputing(keeps_random_numbers=False)
    again(lambda tensor: calls.append(1) or tensor.sin().sin(), given).sum().backward()
    assert len(calls) == 2
