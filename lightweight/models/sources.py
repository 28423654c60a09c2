"""Where do a model's weights come from? A folder, the hub, a package, or random numbers."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightweight.models.config import configuration, has_config, unreachable
from lightweight.models.known import MODELS
from lightweight.models.model import Model, ModelError, Weights
from lightweight.models.quantized_checkpoint import stored_quantization, title
from lightweight.models.tokenizer import has_tokenizer, load_tokenizer
from lightweight.models.writing import drawn_tokenizer, tokenizer_of_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BESIDE_WEIGHTS = ["*.json", "*.txt", "*.model", "*.jinja"]
SNAPSHOT_FILES = [*BESIDE_WEIGHTS, "*.safetensors"]
"""What is fetched of a hub repository: no pickled weights and no code."""


class NoTokenizerError(ModelError):
    """A model whose tokenizer is not on this machine. The model itself may be usable."""


def find(model: Model, weights: Weights | None = None) -> tuple[Model, str | None]:
    """Find the weights of `model`: returns the model with `weights` and `location` filled in, and a line for the user.

    With `weights` None, pretrained weights are taken if they are available, else random ones; the line says so. Raises
    ModelError.
    """
    if weights == "random" or (weights is None and model.source is None):
        return _random(model), None
    try:
        return _pretrained(model), None
    except ModelError as error:
        if weights == "pretrained" or (model.architecture is None and not has_config(model)):
            raise
        problem = str(error).split("; ")[0]
        return _random(model), f"{problem}; building random weights at its true size"


def find_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer that `model` would be trained with, without loading weights.

    If the model was located, it is the one there; else that of its folder, the hub or its package. For random weights
    it is that of `drawn_tokenizer`. Raises NoTokenizerError if it is not on this machine, and ModelError if it cannot
    be used.
    """
    if model.is_loadable:
        return load_tokenizer(model)
    if model.gguf_file is not None:
        return tokenizer_of_gguf(model)
    if model.source is None or model.weights == "random":
        return drawn_tokenizer(model)
    folder = Path(model.source)
    if not folder.is_dir():
        folder = _without_weights(model)
    if has_tokenizer(folder):
        return load_tokenizer(replace(model, location=str(folder)))
    if any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")):
        return tokenizer_of_gguf(_in_folder(model, folder))
    if has_config(model) and not any(folder.glob("*.safetensors")):
        return drawn_tokenizer(model)
    raise NoTokenizerError(f"model {model.name}: {folder} has no tokenizer: add its tokenizer.json")


def _without_weights(model: Model) -> Path:
    """The folder of what lies beside the weights of a model of the hub's, or of its package. Raises
    NoTokenizerError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    assert model.source is not None
    try:
        return Path(snapshot_download(model.source, allow_patterns=BESIDE_WEIGHTS))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        if (folder := _package_folder(model)) is not None:
            return folder
        raise NoTokenizerError(str(unreachable(model, error))) from error


def _package_folder(model: Model) -> Path | None:
    """Where the package lies that carries the model's weights, None where it is not installed."""
    spec = importlib.util.find_spec(model.package) if model.package else None
    return Path(spec.origin).parent if spec and spec.origin else None


def can_be_random(model: Model) -> bool:
    """Whether a model that has weights can also be built without them."""
    return model.source is not None and (model.architecture is not None or has_config(model))


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
        if (package := _package_folder(model)) is not None:
            return _in_folder(model, package)
        raise unreachable(model, error) from error
    if any(snapshot.glob("*.safetensors")):
        return replace(model, weights="pretrained", location=str(snapshot))
    # Pickled weights only: transformers finds the hub's own safetensors conversion, by repository id.
    return replace(model, weights="pretrained", location=model.source)


def _in_folder(model: Model, folder: Path) -> Model:
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"model {model.name}: {folder} holds an adapter; merge it into its base model and give that")
    for path in folder.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would be waited for
            raise ModelError(f"model {model.name}: {path} is no file; take it out of there")
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
        if not has_config(model):
            raise ModelError(
                f"model {model.name}: random weights need an architecture: give a folder with config.json or a known "
                f"name: {', '.join(MODELS)}"
            )
        if (stored := stored_quantization(model, configuration(model))) is not None:
            raise ModelError(
                f"model {model.name}: random weights are not drawn as {title(stored)}; give its weights, or take "
                "quantization_config out of config.json"
            )
    return replace(model, weights="random", location=None, gguf_file=None, weights_file=None)
