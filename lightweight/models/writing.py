"""A folder of safetensors for a model that has none: random weights, or those of a GGUF file."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightweight.internals import gguf
from lightweight.models.config import CAUSAL, configuration
from lightweight.models.loading import check_whole
from lightweight.models.model import Model, refused
from lightweight.models.tokenizer import has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SHARD = "2GB"
"""The most that a file has: safetensors up to 0.6 copies what it writes."""


OTHER_FILE = "give another file, or a folder of safetensors"
"""The mend where a GGUF file is of no use."""


def write(model: Model, folder: Path, seed: int) -> Model:
    """Write the safetensors folder of a model that has none yet, and return the model located there.

    Random weights are drawn on the CPU, the same on every machine for a seed, and stored as float16, as opt-350m's own
    are. Their tokenizer is ByT5's byte-level one, which needs no files, unless the model's folder has one. Raises
    ModelError.
    """
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    from lightweight.models.random_weights import drawn

    if model.gguf_file:
        with refused(model, f"{model.gguf_file} cannot be read", OTHER_FILE), gguf.read_once():
            network = _unpacked(model)
            tokenizer = tokenizer_of_gguf(model)
    else:
        config, tokenizer = _architecture(model)
        set_seed(seed)
        with refused(model, "no network can be built of its config.json", CAUSAL):
            build = partial(AutoModelForCausalLM.from_config, dtype=torch.float16, trust_remote_code=False)
            network = drawn(partial(build, config), seed)
    network.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)
    return replace(model, location=str(folder), gguf_file=None)


def tokenizer_of_gguf(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer in the GGUF file of a model that was found, with the ends of its network. Raises ModelError."""
    from transformers import AutoConfig, AutoTokenizer

    assert model.location is not None
    with refused(model, f"{model.gguf_file} cannot be read", OTHER_FILE), gguf.read_once():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model.location, gguf_file=model.gguf_file)
        config = AutoConfig.from_pretrained(model.location, gguf_file=model.gguf_file)
        _end_as_the_network_does(tokenizer, config)
    return tokenizer


def _end_as_the_network_does(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Give a tokenizer read from GGUF the ends that its network has: transformers 5.17 takes the first token of a
    turn for the last one, and none to pad with."""
    for name in ("eos_token", "pad_token"):
        if (number := getattr(config, f"{name}_id", None)) is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))


def _unpacked(model: Model) -> PreTrainedModel:
    """The network of a GGUF file with plain float32 weights, as a model of its own: transformers does not save the one
    it loads from GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    assert model.location is not None
    loaded: Any
    tensors: dict[str, Any]
    loaded, tensors = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair, with the loading info
        model.location,
        gguf_file=model.gguf_file,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    check_whole(model, tensors)
    vars(loaded.config).pop("quantization_config", None)
    network: PreTrainedModel = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    network.load_state_dict(loaded.state_dict())
    return network


def drawn_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model with random weights: its folder's, else ByT5's byte-level one. Raises ModelError."""
    from transformers import ByT5Tokenizer

    if model.architecture is None and has_tokenizer(Path(model.source or "")):
        return load_tokenizer(replace(model, location=model.source))
    return ByT5Tokenizer()


def _architecture(model: Model) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The configuration that random weights are drawn for, its special tokens those of the tokenizer."""
    config = configuration(model)
    tokenizer = drawn_tokenizer(model)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config.bos_token_id = tokenizer.bos_token_id
    return config, tokenizer
