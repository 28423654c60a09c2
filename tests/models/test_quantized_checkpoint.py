"""Checkpoints that come quantized."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, ByT5Tokenizer, FineGrainedFP8Config
from transformers.quantizers.auto import AutoHfQuantizer

from lightweight import methods, models
from lightweight.methods import BASELINE, LORA, QLORA, MethodError, adapted_layers
from lightweight.models import Model, ModelError, quantized_checkpoint
from models.damage import settings, tensors

CPU = torch.device("cpu")


@pytest.fixture
def quantized(weights_folder, tmp_path) -> Callable[..., Model]:
    """The micro model as a checkpoint quantized by bitsandbytes."""

    def write(**kind: Any) -> Model:
        folder = tmp_path / "quantized"
        network = AutoModelForCausalLM.from_pretrained(
            weights_folder, quantization_config=BitsAndBytesConfig(**kind), device_map="cpu"
        )
        network.save_pretrained(folder)
        ByT5Tokenizer().save_pretrained(folder)
        return models.find(models.named(str(folder)))[0]

    return write


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (NF4, LORA),
        (NF4 | {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}, LORA),
        (NF4 | {"bnb_4bit_compute_dtype": "bfloat16"}, QLORA),
        ({"load_in_8bit": True}, LORA),
    ],
)
def test_a_bitsandbytes_checkpoint_is_trained_as_it_is(quantized, kind, method):
    model = quantized(**kind)
    method = method.on_cpu()
    settled = methods.settle_quantization(model, models.configuration(model), method)
    assert isinstance(settled, BitsAndBytesConfig)
    assert (settled.load_in_4bit, settled.load_in_8bit) == ("load_in_4bit" in kind, "load_in_8bit" in kind)
    assert settled.bnb_4bit_compute_dtype == torch.float32  # the method's, whatever the checkpoint says
    network = methods.adapt(method, models.load(model, torch.float32, CPU, settled))
    by = f"bitsandbytes {8 if 'load_in_8bit' in kind else 4}-bit"
    assert models.quantization_of(network) == by
    network.config.quantization_config = network.config.quantization_config.to_dict()  # as Unsloth leaves it
    assert models.quantization_of(network) == by
    assert {"q_proj", "v_proj"} <= set(adapted_layers(network))
    loss = network.train()(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    loss.backward()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)


def test_a_quantized_checkpoint_is_forecast_as_it_is(quantized):
    model = quantized(**NF4)
    config = models.configuration(model)
    network = models.skeleton(config, torch.float32, methods.settle_quantization(model, config, LORA))
    packed = {name for name, module in network.named_modules() if type(module).__name__ == "Linear4bit"}
    assert "model.decoder.layers.0.self_attn.q_proj" in packed
    assert models.count_parameters(network) == models.count_parameters(models.skeleton(config, torch.float32, None))
    with pytest.raises(ModelError, match="no forecast can be made of weights quantized by fp8"):
        models.check_forecastable(model, FineGrainedFP8Config())
    models.check_forecastable(model, FineGrainedFP8Config(dequantize=True))


def test_fp8_without_its_kernels_can_be_dequantized(monkeypatch):
    """As on a card that computes in FP8, where transformers takes the kernels of a package that is not there."""
    in_fp8 = SimpleNamespace(
        validate_environment=lambda **_: None, quantization_config=FineGrainedFP8Config(), is_trainable=True
    )
    monkeypatch.setattr(AutoHfQuantizer, "from_config", lambda *_, **__: in_fp8)
    monkeypatch.setattr("transformers.utils.import_utils.is_kernels_available", lambda: False)
    mend = r"pip install kernels\): .*quantization=FineGrainedFP8Config\(dequantize=True\)$"
    with pytest.raises(ModelError, match=mend):
        quantized_checkpoint.check_trainable(Model(name="stored", source="stored"), FineGrainedFP8Config())


@pytest.mark.parametrize(
    ("method", "more", "expected"),
    [
        (BASELINE, {}, "its weights cannot be trained directly: take a method with an adapter"),
        (replace(QLORA, quantization=BitsAndBytesConfig(load_in_8bit=True)), {}, "bitsandbytes 8-bit cannot be put on"),
        (replace(QLORA, quantization=FineGrainedFP8Config()), {}, "fp8 cannot be put on"),
        (LORA, {"sharded": True}, "which FSDP cannot share among ranks"),
    ],
)
def test_a_method_that_cannot_train_a_quantized_checkpoint_is_one_line(quantized, method, more, expected):
    model = quantized(**NF4)
    with pytest.raises(MethodError, match=expected) as raised:
        methods.settle_quantization(model, models.configuration(model), method, **more)
    assert str(raised.value).startswith(f"method {method.name}: model {model.name} is quantized by bitsandbytes 4-bit")


def test_a_method_that_quantizes_to_8_bits_cannot_be_sharded():
    of_8_bits = replace(LORA, quantization=BitsAndBytesConfig(load_in_8bit=True))
    config = models.configuration(models.OPT_TINY)
    with pytest.raises(MethodError, match=r"^method lora: it quantizes to bitsandbytes 8-bit, in integers, which FSDP"):
        methods.settle_quantization(models.OPT_TINY, config, of_8_bits, sharded=True)
    assert methods.settle_quantization(models.OPT_TINY, config, of_8_bits) is of_8_bits.quantization


UNTRAINABLE: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 128},
    "awq": {"bits": 4, "group_size": 128},
    "mxfp4": {},
    "compressed-tensors": {"config_groups": {}},
    "hqq": {"quant_config": {}},
    "quanto": {"weights": "int8"},
    "torchao": {"quant_type": {}},
    "aqlm": {},
    "nope": {},
}
"""Either transformers trains none of it, or it needs a package that is not installed here."""


@pytest.mark.parametrize("kind", UNTRAINABLE)
@pytest.mark.parametrize("method", [BASELINE, LORA, QLORA], ids=lambda method: method.name)
def test_a_checkpoint_that_no_method_can_train_is_one_line_of_the_model(weights_folder, kind, method):
    stored = {"quant_method": kind, **UNTRAINABLE[kind]}
    settings("config.json", quantization_config=stored)(weights_folder)
    model = models.named(str(weights_folder))
    with pytest.raises(ModelError, match=f"its checkpoint is quantized by {kind}, which") as raised:
        methods.settle_quantization(model, models.configuration(model), method)
    assert "\n" not in str(raised.value)
    dequantizes = kind == "mxfp4" and "cannot train" in str(raised.value)
    assert ("take a method with quantization=Mxfp4Config(dequantize=True)" in str(raised.value)) == dequantizes
    with pytest.raises(ModelError, match=r"random weights are not drawn as|which cannot be read here"):
        models.find(model, "random")


def test_the_scales_of_fp8_weights_are_not_dropped(weights_folder, without_gpu):
    """transformers dequantizes them where no card computes in FP8; without their scales they are up to 448."""
    theirs = load_file(weights_folder / "model.safetensors")

    def in_fp8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in [name for name in weights if name.endswith(("_proj.weight", "fc1.weight", "fc2.weight"))]:
            scale = weights[name].abs().max().float() / 448
            weights[name] = (weights[name].float() / scale).to(torch.float8_e4m3fn)
            blocks = [-(-size // 16) for size in weights[name].shape]
            weights[f"{name}_scale_inv"] = scale.expand(blocks).contiguous()
        return weights

    tensors(in_fp8)(weights_folder)
    stored = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    settings("config.json", quantization_config=stored)(weights_folder)
    found, _ = models.find(models.named(str(weights_folder)))
    settled = methods.settle_quantization(found, models.configuration(found), LORA)
    loaded = models.load(found, torch.float32, CPU, settled).state_dict()
    for name, tensor in theirs.items():
        assert torch.allclose(loaded[name], tensor.float(), atol=float(tensor.abs().max()) / 16), name
