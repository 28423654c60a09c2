"""The tokenizer that lies beside the weights, and whether its rows fit the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightweight.models.config import longest_row
from lightweight.models.model import Model, ModelError, refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "tekken.json")
"""One of these is in a folder that has a tokenizer."""

EXTRA_TOKENS = 10_000
"""More than any tokenizer has further tokens: a damaged number must not fill the memory."""

PROBE = "The sea was calm, and so were we."
"""What every tokenizer has tokens for: one that has none is empty."""


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the weights. Raises ModelError, also for one without an end or that encodes text
    as nothing."""
    from transformers import AutoTokenizer, ByT5Tokenizer

    assert model.location is not None
    folder = Path(model.location)
    if folder.is_dir() and not has_tokenizer(folder):
        raise ModelError(
            f"model {model.name}: {folder} has no tokenizer: add its tokenizer.json and tokenizer_config.json"
        )
    with refused(model, "its tokenizer cannot be used", "give the tokenizer's files as they were published"):
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
        raise ValueError("it encodes plain text as unknown tokens only")
    if tokenizer.eos_token_id is None:
        raise ValueError("it has no end token: name an eos_token in tokenizer_config.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in `folder`."""
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


def check_rows(model: Model, config: Any, *, longest: int, largest: int) -> None:
    """Raise ModelError where the network has no embedding for the `largest` id of rows, or none for a position of those
    that are `longest`, in tokens: in a kernel that is an index out of bounds, or no error at all. `config` is the
    network's."""
    text = config.get_text_config(decoder=True)
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
