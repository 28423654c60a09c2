"""Unsloth needs a GPU: these see what it is asked for, through a stand-in of its interface."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import BitsAndBytesConfig

from lightweight import models
from lightweight.methods import LORA, QLORA
from lightweight.preload import peft
from lightweight.targets import CPU
from lightweight.training import unsloth
from lightweight.trial import Trial


@pytest.fixture
def asked(monkeypatch, micro):
    """What Unsloth was asked for, by the name of its function."""
    calls = {}

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(location, **options):
            calls["from_pretrained"] = options
            return models.load(replace(micro, location=location), torch.float32, torch.device("cpu"), None), None

        @staticmethod
        def get_peft_model(network, **options):
            calls["get_peft_model"] = options
            return network

        @staticmethod
        def for_training(network, **_):
            return network

    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=FastLanguageModel))
    return calls


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"]),
        ({"v_proj", "q_proj"}, ["q_proj", "v_proj"]),
        (r".*\.fc\d", ["fc1", "fc2"]),
        (None, ["q_proj", "v_proj"]),
    ],
)
def test_unsloth_gets_the_names_of_layers(asked, micro, small_corpus, targets, expected):
    assert isinstance(LORA.adapter, peft.LoraConfig)
    method = replace(LORA, adapter=replace(LORA.adapter, target_modules=targets), library="unsloth")
    trial = Trial(model=micro, method=method, target=CPU, corpus=small_corpus)
    unsloth.build(trial, torch.device("cpu"), None)
    assert asked["get_peft_model"]["target_modules"] == expected


@pytest.mark.parametrize("quantization", [None, BitsAndBytesConfig(load_in_4bit=True)])
def test_unsloth_loads_4_bits_where_the_checkpoint_or_the_method_has_them(asked, micro, small_corpus, quantization):
    trial = Trial(model=micro, method=replace(QLORA, library="unsloth"), target=CPU, corpus=small_corpus)
    unsloth.build(trial, torch.device("cpu"), quantization)
    assert asked["from_pretrained"]["load_in_4bit"] is (quantization is not None)
    assert asked["from_pretrained"]["load_in_16bit"] is (quantization is None)
