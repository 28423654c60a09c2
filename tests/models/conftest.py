"""A small model's folder, and a machine without the hub."""

from pathlib import Path

import pytest


@pytest.fixture
def weights_folder(micro, tmp_path) -> Path:
    """A folder of somebody's: config, safetensors and tokenizer, its size unknown to us."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for file in Path(micro.location).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
