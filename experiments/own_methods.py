"""Methods of one's own, to be trained beside the suite's: five that people have published since 2024, or that they use.

    python -m pytest experiments --method baseline --method lora --method experiments/own_methods.py:MUON
    lightweight plan smollm2-135m --method experiments/own_methods.py:DORA
    lightweight train --method experiments/own_methods.py:LORA_PLUS --model ... --corpus ...

Each is what its author would write: a config of peft where peft implements it, else a function. docs/experiments.md
explains the fields.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

from lightweight.methods import BASELINE, LORA, LORA_CAPTURED
from lightweight.preload import peft

from peft.optimizers import create_loraplus_optimizer  # isort: skip  # after preload, which decides how peft is imported

ADAPTER: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 32, "lora_dropout": 0.1}

# DoRA (https://arxiv.org/abs/2402.09353): LoRA for the direction of a weight, and its magnitude beside it.
DORA = replace(LORA, name="dora", adapter=peft.LoraConfig(**ADAPTER, use_dora=True))

# PiSSA (https://arxiv.org/abs/2404.02948): an adapter that begins as the weight's largest singular values.
PISSA = replace(
    LORA,
    name="pissa",
    adapter=peft.LoraConfig(**ADAPTER | {"lora_alpha": 8, "lora_dropout": 0.0}, init_lora_weights="pissa"),
)


# LoRA+ (https://arxiv.org/abs/2402.12354): B of an adapter learns 16 times as fast as A.
def lora_plus(network: Any, arguments: TrainingArguments) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(
        network,
        torch.optim.AdamW,
        lr=arguments.learning_rate,
        loraplus_lr_ratio=16,
        loraplus_weight_decay=arguments.weight_decay,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
    )


LORA_PLUS = replace(LORA, name="lora-plus", optimizer=lora_plus)
LORA_PLUS_CAPTURED = replace(LORA_CAPTURED, name="lora-plus-captured", optimizer=lora_plus)  # AdamW is what it runs


# Muon (https://kellerjordan.github.io/posts/muon/): steps of hidden matrices are made orthogonal; the rest by AdamW.
class MuonAndAdamW(torch.optim.Optimizer):
    def __init__(self, network: Any, arguments: TrainingArguments) -> None:
        ends = (network.get_input_embeddings(), network.get_output_embeddings())
        ids = {id(weight) for layer in ends for weight in layer.parameters()}
        trained = [weight for weight in network.parameters() if weight.requires_grad]
        matrices = [weight for weight in trained if weight.ndim == 2 and id(weight) not in ids]
        others = [weight for weight in trained if weight.ndim != 2 or id(weight) in ids]
        rate, decay = arguments.learning_rate, arguments.weight_decay
        muon = torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        self.parts: Any = (muon, torch.optim.AdamW(others, lr=rate, weight_decay=decay))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.state = muon.state | self.parts[1].state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()
            self.state.update(part.state)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, saved in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(saved)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


MUON = replace(BASELINE, name="muon", optimizer=MuonAndAdamW)


# DFT (https://arxiv.org/abs/2508.05629): each token's cross-entropy counts by the probability that it already has.
def dynamic_fine_tuning(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    losses = cross_entropy(outputs.logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
    return (losses * torch.exp(-losses.detach())).sum() / num_items_in_batch


DFT = replace(LORA, name="dft", compute_loss=dynamic_fine_tuning)
