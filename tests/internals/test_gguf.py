import inspect

import pytest
from transformers import modeling_gguf_pytorch_utils

from lightweight.internals import gguf as gguf_internals

gguf = pytest.importorskip("gguf")


def test_a_file_is_read_once_within_and_anew_after(monkeypatch):
    readings = []
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: readings.append(path) or path)
    with gguf_internals.read_once():
        assert [gguf.GGUFReader(path) for path in "aab"] == ["a", "a", "b"]
    gguf.GGUFReader("a")
    assert readings == ["a", "b", "a"]


def test_transformers_imports_the_reader_when_it_reads():
    source = inspect.getsource(modeling_gguf_pytorch_utils.load_gguf_checkpoint)
    assert "from gguf import GGUFReader" in source
    assert not hasattr(modeling_gguf_pytorch_utils, "GGUFReader")


def test_names_of_tensors_are_listed_once_within():
    assert "import MODEL_ARCH_NAMES, get_tensor_name_map" in inspect.getsource(
        modeling_gguf_pytorch_utils.get_gguf_hf_weights_map
    )
    arch = gguf.MODEL_ARCH.LLAMA
    with gguf_internals.read_once():
        assert gguf.get_tensor_name_map(arch, 2) is gguf.get_tensor_name_map(arch, 2)
    assert gguf.get_tensor_name_map(arch, 2) is not gguf.get_tensor_name_map(arch, 2)
