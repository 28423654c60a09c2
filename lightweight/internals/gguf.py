"""What is patched in gguf: read in 0.17 and 0.19."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def read_once() -> Iterator[None]:
    """Read each GGUF file once within, and list an architecture's names of tensors once. transformers reads the file
    anew for the configuration, the tokenizer and each step of loading weights, and with some 50,000 tokens each reading
    takes seconds; it lists the names anew for every module. transformers/modeling_gguf_pytorch_utils.py imports both
    when it reads."""
    import gguf

    with (
        mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        yield
