"""Are the layers of a decoder, with our kernels in them, the layers they were? Whole networks on the CPU, their kernels
interpreted by Triton, or on the GPU where there is one: loss and gradients against peft's own, in fp32."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightweight.captured import activations, blocks, launching, offload, rotary
from lightweight.captured.frozen import Lean
from lightweight.internals.transformers import called_by, recomputable_layers, rotation_of
from lightweight.preload import peft
from tests.captured.test_kernels import HAS_CUDA, apart  # noqa: F401  a fixture

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama without down": {},  # which has no adapter
    "qwen3": {},
    "qwen3 of uneven norms": {},  # from whose results nothing can be had back
    "gemma3_text": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8},
    "cohere": {},  # neighbours are turned
    "glm": {"partial_rotary_factor": 0.5},  # and in half of a head
    "olmo2": {},  # norms of all heads at once
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": {"residual_multiplier": 0.3},
    "nemotron": {"hidden_act": "relu2"},
    "phi3": {},
}
FUSED = {
    "llama": {"blocks": 2, "gates": 2, "rotated": 2},
    "llama without down": {"blocks": 2, "gates": 2, "rotated": 2},
    "qwen3": {"blocks": 2, "gates": 2, "rotated": 2},
    "qwen3 of uneven norms": {"blocks": 2, "gates": 2, "rotated": 2},
    "gemma3_text": {"blocks": 2, "gates": 2, "rotated": 2},
    "gemma2": {"blocks": 2, "gates": 2, "rotated": 2},
    "cohere": {"blocks": 0, "gates": 2, "rotated": 2},
    "glm": {"blocks": 2, "gates": 0, "rotated": 2},
    "granite": {"blocks": 0, "gates": 2, "rotated": 2},
    "smollm3": {"blocks": 2, "gates": 2, "rotated": 1},
}
"""What is taken of some of them."""


def build(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind.split()[0], **SMALL, **KINDS[kind]), dtype=torch.float32
    )
    targets = ["q_proj", "gate_proj", "up_proj"] if "without down" in kind else "all-linear"
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets)
    network = peft.get_peft_model(model, adapter).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad or "norm" in name:  # B starts at zero, and norms at one
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif parameter.dim() == 2:
                parameter.mul_(4.0)
            if "uneven" in kind and "q_norm" in name:
                parameter[0] = 0.0
    return network.to("cuda" if HAS_CUDA else "cpu")


def loss_and_gradients(network: Any) -> tuple[float, dict[str, torch.Tensor]]:
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(3)).to(network.device)
    loss = network(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    return loss.item(), gradients


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        *((kind, "kept") for kind in KINDS),
        *((kind, "computed twice") for kind in ("qwen3", "gemma3_text")),
        *((kind, "on the host") for kind in ("llama", "llama without down", "gemma2")),
    ],
)
def test_a_decoder_with_our_kernels_has_its_own_loss_and_gradients(apart, kind, layers) -> None:  # noqa: F811
    apart(check_decoder, kind, layers)


def check_decoder(kind: str, layers: str) -> None:
    take, launching.take = launching.take, lambda x: True
    reference, network = build(kind), build(kind)
    expected_loss, expected = loss_and_gradients(reference)
    before = rotation_of(next(m for m in network.modules() if hasattr(m, "o_proj") or hasattr(m, "qkv_proj")))[0]
    if layers == "computed twice":
        network.gradient_checkpointing_enable({"use_reentrant": False})
        network.enable_input_require_grads()
    if layers == "on the host":
        offload.SMALLEST_BYTES = 1
        decoder = recomputable_layers(network)
        host = offload.Offload(network.get_base_model(), decoder)
        called_by({layer: host.calling(layer, None) for layer in decoder})
    launched: list[str] = []
    try:
        lean = Lean(network)
        lean.roll()
        with launching.launches_told_to(lambda name, *_: launched.append(name)):
            loss, found = loss_and_gradients(network)
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        for key, gradient in found.items():
            assert torch.allclose(gradient, expected[key], atol=2e-5, rtol=1e-4), key
        wanted = FUSED.get(kind, {})
        if wanted and layers != "kept":  # each layer ends with its sum, whose norm is the next one's
            passes = 2 if layers == "computed twice" else 1
            assert launched.count("add_norm") == passes * wanted["blocks"]
            assert launched.count("add_norm_backward") == wanted["blocks"]
            again = wanted["gates"] * (layers == "on the host" and "without down" not in kind)
            assert launched.count("gate") == passes * wanted["gates"]
            # norm before attention; and that of gates once for them and once for their adapters
            assert launched.count("norm") >= 2 * wanted["blocks"] + again
        if wanted and layers == "kept":
            assert launched.count("rotate") == launched.count("rotate_backward") == wanted["rotated"]
            assert launched.count("add_norm_backward") == 2 * wanted["blocks"]
            of_gates = "gate_backward" if "without down" in kind else "gate_project_backward"
            assert launched.count(of_gates) == wanted["gates"]
            assert not wanted["blocks"] or "norm_backward" not in launched  # none is left without its sum
        lean.undo()
        attention = next(m for m in network.modules() if hasattr(m, "o_proj") or hasattr(m, "qkv_proj"))
        assert rotation_of(attention)[0] is before
        assert not any("forward" in vars(module) for module in network.modules())
    finally:
        launching.take = take


def test_a_function_that_turns_otherwise_is_left_alone() -> None:
    def turn(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        turns = rotary.Turns(cos, sin, neighbours=True, repeated=False)
        return rotary.turned(q, turns), rotary.turned(k, turns)

    assert rotary.pairing_of(turn, is_partial=False) == rotary.Pairing(neighbours=True, repeated=False)
    assert rotary.pairing_of(lambda q, k, cos, sin: turn(q, k, cos, -sin), is_partial=False) is None
    assert rotary.pairing_of(lambda q, k, cos, sin: (turn(q, k, cos, sin)[0], k), is_partial=False) is None


def test_a_layer_is_of_a_form_by_what_it_computes() -> None:
    for kind, form in (("llama", blocks.FORMS[0]), ("gemma3_text", blocks.FORMS[1]), ("granite", None)):
        layer = next(m for m in build(kind).modules() if hasattr(m, "self_attn"))
        assert blocks.form_of(layer) == form
    layer = next(m for m in build("llama").modules() if hasattr(m, "self_attn"))
    own = type(layer).forward

    class Parallel(type(layer)):  # type: ignore[misc]
        """Both branches of what comes in."""

        def forward(self, hidden_states: torch.Tensor, **options: Any) -> Any:
            return own(self, hidden_states, **options) + self.mlp(hidden_states)

    class Withholding(type(layer)):  # type: ignore[misc]
        """Its attention gets another mask than it does."""

        def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **options: Any) -> Any:
            return own(self, hidden_states, attention_mask=None, **options)

    form = blocks.form_of(layer)
    for other in (Parallel, Withholding):
        layer.__class__ = other
        assert form is not None and blocks.form_of(layer) is None


def test_a_gate_is_known_by_what_it_computes() -> None:
    mlp = next(m for m in build("llama").modules() if hasattr(m, "gate_proj"))
    assert activations.gating_of(mlp) == "silu"
    mlp.act_fn = torch.nn.GELU(approximate="tanh")
    assert activations.gating_of(mlp) == "gelu_tanh"
    mlp.act_fn = torch.nn.Sigmoid()
    assert activations.gating_of(mlp) is None

    class Swapped(type(mlp)):  # type: ignore[misc]
        """What is let through is activated."""

        def forward(self, x: torch.Tensor) -> Any:
            return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))

    mlp.act_fn, mlp.__class__ = torch.nn.SiLU(), Swapped
    assert activations.gating_of(mlp) is None
