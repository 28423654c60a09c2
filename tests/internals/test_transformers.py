from contextlib import nullcontext

import pytest
import torch

from lightweight import preload  # isort: skip  # noqa: F401  # before Trainer, which imports peft
from transformers import AutoModelForCausalLM, OPTConfig, Trainer, TrainingArguments
from transformers.masking_utils import create_causal_mask

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
