"""Does the captured step train what the Trainer trains, whatever the architecture?

Tiny networks of transformers' causal language models with random weights, each trained by LoRA for four steps in fp32
without dropout, by the Trainer and by the captured step. CI takes a sample of the kinds, `--every-architecture` all.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, ByT5Tokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from captured import flash_reference
from lightweight import corpus, methods, models
from lightweight.captured import flash, packing
from lightweight.child import worker
from lightweight.cli.train import Unattended
from lightweight.corpus import pair
from lightweight.methods import Method
from lightweight.preload import peft
from lightweight.targets import CPU
from lightweight.training.meter import Meter
from lightweight.trial import Trial

SAMPLE = (
    *("bart", "bert", "bloom", "cohere", "falcon", "gemma2", "gpt_bigcode", "gpt_neox", "gptj", "granite"),
    *("llama", "mistral", "mixtral", "mpt", "olmo2", "phi3", "qwen3", "qwen3_next", "recurrent_gemma", "rwkv"),
)
"""Own losses and attentions, scaled logits, windows, soft caps, experts, recurrences, position biases."""

ON_FLASH = ("gemma3_text", "gpt_neox", "olmo3")
"""The sample on flash kernels: full and sliding layers in one network, partial rotary embeddings, no groups."""

MOST_PARAMETERS = 15_000_000
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "word_embed_proj_dim", "lru_width"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_layers", "num_decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_chunk_size", "chunk_size"), 32),
    **dict.fromkeys(("mamba_d_state", "mamba_state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    "mamba_d_ssm": 128,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size"), 128),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "attention_hidden_size"), 64),
    **dict.fromkeys(("sliding_window", "attention_window", "window_size"), 32),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "head_dim"), 16),
    **dict.fromkeys(("state_size", "rotary_dim", "conv_kernel"), 8),
    **{"vocab_size": 384, "num_key_value_heads": 2, "num_experts_per_tok": 2, "linear_num_value_heads": 4},
    **{"linear_num_key_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "is_decoder": True},
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input", "global_head_dim"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **{"qk_rope_head_dim": 8, "qk_head_dim": 24, "vocab_size_per_layer_input": 384, "num_kv_shared_layers": 2},
    **{"embedding_size": 64, "dim": 64, "depth": 2, "image_size": 32, "patch_size": 16},
    "attention_types": [[["global", "local"], 2]],
    **{"full_attn_idxs": [1, 3], "attn_layer_indices": [1, 3]},
    **{"attn_layer_period": 2, "attn_layer_offset": 1, "axial_pos_embds": False},
}
"""What makes a network of any kind small, by every name that configurations use for it."""

LEFT_OUT = object()
OTHERWISE: tuple[dict[str, Any], ...] = (
    {},
    {"bos_token_id": LEFT_OUT},
    {"head_dim": LEFT_OUT},
    {"head_dim": 32},
    {"num_key_value_heads": 4},
    {"num_kv_shared_layers": 0},
    {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 4},
    {"q_lora_rank": LEFT_OUT, "n_shared_experts": LEFT_OUT},
    {"layer_types": ["conv", "full_attention"] * 2},
    {"layer_types": ["linear_attention", "hybrid"] * 2},
    {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    {"attention_hidden_size": 128},
    {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128, "attention_head_dim": 32},
    {"num_experts_per_tok": 1, "default_language": "en_XX", "head_dim": LEFT_OUT},
)
"""What is tried where a configuration refuses these sizes, or gives no network that computes with them."""

PAIRS = tuple(
    pair(f"What is {n} times {n}?" * (1 + n % 3), f"It is {n * n}, since {'x' * (n % 7)}.") for n in range(20)
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = metafunc.config.getoption("every_architecture", False)
    known = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    kinds = known if every else [kind for kind in SAMPLE if kind in CONFIG_MAPPING]
    if "kind_on_flash" in metafunc.fixturenames:
        metafunc.parametrize("kind_on_flash", known if every else ON_FLASH)
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", kinds)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # gpt_bigcode's own
def test_captured_steps_train_what_the_trainer_trains(kind: str, tmp_path: Path) -> None:
    network = small(kind)
    if isinstance(network, str):
        assert kind not in SAMPLE, network
        pytest.skip(f"not run: {kind} is not made small: {network}")
    network.save_pretrained(tmp_path / kind)
    ByT5Tokenizer().save_pretrained(tmp_path / kind)
    assert isinstance(methods.LORA.adapter, peft.LoraConfig)
    adapter = replace(methods.LORA.adapter, lora_dropout=0.0)
    settings = {"per_device_train_batch_size": 4, "learning_rate": 1e-3}
    stock = Method(name="stock", adapter=adapter, training_arguments=settings)
    try:
        losses, _ = _trained(tmp_path, kind, stock)
    except (methods.MethodError, RuntimeError, ValueError) as error:
        if kind in SAMPLE:
            raise
        pytest.skip(f"not run: {kind} is not trained by the Trainer: {error}")
    captured, note = _trained(tmp_path, kind, replace(stock, name="captured", step="captured"))
    assert captured == pytest.approx(losses, abs=1e-4), note
    assert kind not in SAMPLE or "the Trainer runs the steps" not in note, note


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_captured_steps_on_flash_kernels_train_what_they_train_with_masks(
    kind_on_flash: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels' part is played by a reference for the CPU, and in fp32, so that nothing passes for rounding."""
    network = small(kind_on_flash)
    if isinstance(network, str):
        pytest.skip(f"not run: {kind_on_flash} is not made small: {network}")
    network.save_pretrained(tmp_path / kind_on_flash)
    ByT5Tokenizer().save_pretrained(tmp_path / kind_on_flash)
    assert isinstance(methods.LORA.adapter, peft.LoraConfig)
    adapter = replace(methods.LORA.adapter, lora_dropout=0.0)
    settings = {"per_device_train_batch_size": 4, "learning_rate": 1e-3}
    captured = Method(name="captured", adapter=adapter, training_arguments=settings, step="captured")
    try:
        expected, with_masks = _trained(tmp_path, kind_on_flash, captured)
    except (methods.MethodError, RuntimeError, ValueError) as error:
        pytest.skip(f"not run: {kind_on_flash} is not trained by the captured step: {error}")
    monkeypatch.setattr(flash, "HALVES", (torch.float32,))
    monkeypatch.setitem(flash.OFF, torch.float32, 1e-4)
    monkeypatch.setattr(packing, "TOKEN_BLOCK", 16)
    asked: list[tuple[Any, ...]] = []
    with flash_reference.on_a_cpu(asked):
        losses, note = _trained(tmp_path, kind_on_flash, captured)
    assert losses == pytest.approx(expected, abs=1e-4), note
    assert _given_up(note) == _given_up(with_masks), note
    assert kind_on_flash not in ON_FLASH or asked, note


def _given_up(note: str) -> list[str]:
    return [part.split(" given up: ")[0] for part in note.split("; ") if " given up: " in part]


def small(kind: str) -> Any:
    """A network of that kind, its matrices four times what they are drawn as, so that a wrong context shows in the
    loss; or why there is none."""
    ids = torch.arange(3, 23).unsqueeze(0)
    problem = ""
    for otherwise in OTHERWISE:
        try:
            config = CONFIG_MAPPING[kind](**_sizes(CONFIG_MAPPING[kind], SMALL | otherwise))
            for name in vars(config):
                if "drop" in name and isinstance(getattr(config, name), float):
                    setattr(config, name, 0.0)  # BigBird makes modules of it while it runs
            with torch.device("meta"):
                size = models.count_parameters(AutoModelForCausalLM.from_config(config))
            if size > MOST_PARAMETERS:
                problem = problem or f"{size} parameters"
                continue
            transformers.set_seed(0)
            network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            with torch.no_grad():
                for weight in network.parameters():
                    if weight.dim() >= 2:
                        weight.mul_(4.0)
                logits = network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            if logits.shape[:2] == ids.shape and logits.isfinite().all():
                return network
            problem = problem or "its logits are not those of each token"
        except Exception as error:  # noqa: BLE001  what a configuration refuses, and how, is not asked here
            problem = problem or f"{type(error).__name__}: {error}"
    return problem


def _sizes(config_class: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """Those of the `wanted` that a configuration knows, and that the configurations in it know."""
    known = {*inspect.signature(config_class.__init__).parameters}
    known |= {name for base in config_class.__mro__ for name in getattr(base, "__annotations__", {})}
    sizes = {name: value for name, value in wanted.items() if name in known and value is not LEFT_OUT}
    for name in getattr(config_class, "sub_configs", {}):
        if (inner := getattr(config_class(), name, None)) is not None:
            sizes[name] = {"model_type": inner.model_type} | _sizes(type(inner), wanted)
    return sizes | _mixed(config_class, sizes)


def _mixed(config_class: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Layers of every type that a network of this kind has, in turn, where so few layers would have one once."""
    with contextlib.suppress(Exception):  # what a configuration refuses, it refuses below
        small = getattr(config_class(**sizes), "layer_types", None)
        if small and (len({*small}) == 1 or any(small.count(one) == 1 for one in small)):
            types = [*dict.fromkeys(getattr(config_class(), "layer_types", None) or small)]
            types = types if len(types) > 1 else [*types, "full_attention"]
            mixed = [types[index % len(types)] for index in range(len(small))]
            config_class(**sizes, layer_types=mixed)
            return {"layer_types": mixed}
    return {}


def _trained(root: Path, kind: str, method: Method) -> tuple[list[float], str]:
    """The losses of four steps without dropout, and the note of a captured step."""
    model, _ = models.find(models.named(str(root / kind)), "pretrained")
    data = corpus.Corpus(train=PAIRS[:16], heldout=PAIRS[16:], digest="")
    trial = Trial(model=model, method=method, target=CPU, corpus=data, max_steps=4, max_length=128)
    meter = Meter(torch.device("cpu"), start_seconds=0.0)
    _, trainer, rows, heldout = worker.set_up(trial, meter.device, meter, Unattended(), root / "run")
    assert trainer.model is not None
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)
    worker.train(trial, trainer, rows, heldout, meter, lambda phase: None)
    return list(meter.train_loss), str(meter.facts.get("capture_note"))
