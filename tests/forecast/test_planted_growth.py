"""What an upgrade can make a step hold more of, planted in the libraries one by one: a plan before and one after, and
whether `lightweight gate` names the cause."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.loss import loss_utils
from transformers.models.llama import modeling_llama

from lightweight.__main__ import main
from lightweight.forecast import cuda_rules, plan
from lightweight.forecast.plan_row import PlanOptions
from lightweight.methods import BASELINE, LORA, LORA_CAPTURED, QLORA
from lightweight.models import Model
from lightweight.targets import T4
from lightweight.training import ranks

SMALL = Model(
    name="small",
    architecture={
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
)
HALF = replace(
    BASELINE,
    name="half",
    weights_dtype="float16",
    training_arguments={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
)


def write(path, method, **question):
    rows = plan.plan([SMALL], [method], [T4], PlanOptions(**question))
    path.write_text(json.dumps([row.as_json() for row in rows]), "utf-8")
    return path


def more_saved(monkeypatch):
    """An activation function that saves a tensor more for backward."""
    own = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: torch.tanh(own(self, x)))


def more_of_logits(monkeypatch):
    """A loss on capped logits, the kind that Gemma has, in fp32."""
    own: Any = loss_utils.LOSS_MAPPING["ForCausalLM"]

    def capped(logits, *rest, **named):
        return own(30 * torch.tanh(logits.float() / 30), *rest, **named)

    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", capped)


def built_otherwise(monkeypatch, change):
    own = AutoModelForCausalLM.from_config

    def from_config(*given, **named):
        network = own(*given, **named)
        change(network)
        return network

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", from_config)


def a_second_copy(monkeypatch):
    """A head that is tied to the embeddings no more."""

    def untie(network):
        network.lm_head.weight = nn.Parameter(network.lm_head.weight.clone())

    built_otherwise(monkeypatch, untie)


def a_third_moment(monkeypatch):
    """AdamW that keeps the largest second moment as well."""
    own = torch.optim.AdamW.__init__

    def init(self, *given, **named):
        own(self, *given, **named)
        for group in self.param_groups:
            group["amsgrad"] = True

    monkeypatch.setattr(torch.optim.AdamW, "__init__", init)


def gradients_in_fp32(monkeypatch):
    """Weights that are to be trained in half precision, and are upcast: their gradients are fp32, too."""
    built_otherwise(monkeypatch, lambda network: network.float())


def gradients_that_stay(monkeypatch):
    """Gradients that are set to zero after a step, and are not released."""

    def zero_grad(self, set_to_none=True):
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()

    monkeypatch.setattr(nn.Module, "zero_grad", zero_grad)


def smaller_blocks(monkeypatch):
    """A scale for every 32 weights of 4 bits, in place of 64."""
    own = functional.quantize_4bit
    monkeypatch.setattr(functional, "quantize_4bit", lambda *given, **named: own(*given, **named | {"blocksize": 32}))


def larger_workspaces(monkeypatch):
    """A cuBLAS that takes as much on each card as on Hopper."""
    monkeypatch.setattr(cuda_rules, "CUBLAS_WORKSPACE_BYTES", cuda_rules.CUBLAS_WORKSPACE_BYTES_HOPPER)


def whole_weights_kept(monkeypatch):
    """FSDP2 that keeps a layer's whole weights from forward to backward."""
    config = {**ranks.SHARDED["fsdp_config"], "reshard_after_forward": False}
    monkeypatch.setattr(ranks, "SHARDED", {**ranks.SHARDED, "fsdp_config": config})


PLANTED = [
    (more_saved, LORA, {}, "activations"),
    (more_of_logits, LORA, {}, "logits"),
    (a_second_copy, LORA, {}, "weights"),
    (a_second_copy, LORA_CAPTURED, {}, "weights"),
    (a_third_moment, BASELINE, {}, "optimizer"),
    (gradients_in_fp32, HALF, {}, "gradients"),
    (gradients_that_stay, BASELINE, {}, "gradients"),
    (smaller_blocks, QLORA, {}, "quantization state"),
    (larger_workspaces, LORA, {}, "workspace"),
    (whole_weights_kept, BASELINE, {"gpus": 2, "placement": "sharded"}, "gathered"),
]


@pytest.mark.parametrize(
    ("plant", "method", "question", "cause"),
    PLANTED,
    ids=[f"{plant.__name__}-{method.name}" for plant, method, _, _ in PLANTED],
)
def test_growth_is_told_with_its_cause(plant, method, question, cause, tmp_path, monkeypatch, capsys):
    before = write(tmp_path / "before.json", method, **question)
    again = write(tmp_path / "again.json", method, **question)
    assert main(["gate", str(before), str(again), "--memory-fail", "0.01%"]) == 0
    assert "FAILED" not in capsys.readouterr().out
    plant(monkeypatch)
    after = write(tmp_path / "after.json", method, **question)
    assert main(["gate", str(before), str(after), "--memory-fail", "0.1%"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert line.startswith(f"FAILED small x {method.name} on ")
    assert "peak allocated" in line and "in before.json" in line
    grew = line.partition("what grew is ")[2].partition(";")[0]
    assert cause in grew, line
    assert main(["gate", str(after), str(before), "--memory-fail", "0.1%"]) == 0
