"""Jobs of a few steps over small networks of many architectures, on the CPU."""

import dataclasses
from typing import Any

import peft
import pytest
import torch
import transformers
from training.test_stock import Unattended
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer

from lightweight import corpus, methods, targets
from lightweight.child import worker
from lightweight.methods import CapturedStep, Method
from lightweight.models import Model
from lightweight.training import stock
from lightweight.training.meter import Meter
from lightweight.trial import Trial

CPU = torch.device("cpu")


LENGTH = 96


ANY = {"vocab_size": 384, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


WIDE = ANY | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "opt": ANY
    | {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 128,
        "dropout": 0.0,
    },
    "mamba": ANY | {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
    "qwen3_next": WIDE
    | {
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 0,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "mlp_only_layers": [0, 1],
    },
    "mixtral": WIDE
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.5,
        "sliding_window": None,
    },
    "mistral": WIDE | {"sliding_window": 16},
    "phi3": WIDE
    | {
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [1.0 + 3 * index for index in range(8)],
        },
    },
    "qwen2": WIDE
    | {"max_position_embeddings": 32, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "gemma2": WIDE | {"head_dim": 16, "sliding_window": 16},
    "cohere": WIDE,
    "roberta": ANY
    | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "is_decoder": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "gpt_oss": WIDE
    | {
        "head_dim": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neo": ANY
    | {
        "hidden_size": 64,
        "num_layers": 8,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 4]],
        "window_size": 16,
        "max_position_embeddings": 128,
    },
    "bloom": ANY | {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "bart": ANY
    | {
        "d_model": 32,
        "decoder_layers": 2,
        "encoder_layers": 1,
        "decoder_attention_heads": 2,
        "encoder_attention_heads": 2,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 128,
        "dropout": 0.0,
        "forced_eos_token_id": None,
        "decoder_start_token_id": 1,
    },
}


def lora(**settings):
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        **{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", **settings},
    )


def method(adapter=None, step=None, **more):
    arguments = {"per_device_train_batch_size": 4, "learning_rate": 1e-3} | more
    return Method(name="m", adapter=adapter, step=step or CapturedStep(), training_arguments=arguments)


def network(architecture, scale=4.0):
    """Weights that are larger than random ones are, so that a wrong context shows in the loss."""
    transformers.set_seed(0)
    config = AutoConfig.for_model(architecture, **CONFIGS[architecture])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.mul_(scale)
            if architecture == "gpt_neo" and ("q_proj" in name or "k_proj" in name):
                weight.mul_(scale)  # it does not scale their products, which makes a chaos of its layers
    return model


@pytest.fixture
def prepare(small_corpus, tmp_path):
    """Trainer, rows, meter and trial of four steps over dialogues of which some share a row."""
    pairs = [
        corpus.pair("u", talk.messages[1].content[: 6 + 17 * (index % 5)])
        for index, talk in enumerate(small_corpus.train)
    ]
    found = dataclasses.replace(small_corpus, train=tuple(pairs))
    encoded = corpus.encode_all(found.train, ByT5Tokenizer(), corpus.RowForm(LENGTH))

    def prepare(architecture, method, dtype=torch.float32, padded_to: int | None = LENGTH):
        rows = corpus.Rows(encoded.rows, 0, padded_to)
        trial = Trial(
            model=Model(name=architecture, architecture={"model_type": architecture}),
            method=method,
            target=targets.CPU,
            corpus=found,
            max_steps=4,
            max_length=LENGTH,
        )
        built = network(architecture).to(dtype)
        transformers.set_seed(0)
        meter = Meter(CPU, 0.0)
        trainer = stock.make_trainer(trial, methods.adapt(method, built), rows, meter, Unattended(), tmp_path)
        return trainer, rows, meter, trial

    return prepare


def run(trainer, rows, meter, trial):
    """Losses of the job and its note, by whom it is that runs its steps."""
    heldout = worker.Heldout(rows[:2], [])
    worker.train(trial, trainer, rows, heldout, meter, lambda phase: None)
    return meter.measurements().train_loss, meter.facts.get("capture_note")
