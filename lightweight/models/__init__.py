"""Which network is trained, and where do its weights come from?

Every trial loads its model from a folder of safetensors with transformers' own `from_pretrained`: a snapshot of a hub
repository, or a local folder. If there is none, a folder is written once per session: from a GGUF file, or with random
weights of the true architecture. So all methods of a model start from the same weights.
"""

from lightweight.models.config import configuration, configuration_beside_weights, longest_row
from lightweight.models.flop import flop_per_token
from lightweight.models.known import (
    GPT_NEO_1_3B,
    GPT_NEO_TINY,
    LLAMA_3_1_8B,
    LLAMA_3_2_1B,
    LLAMA_TINY,
    MODELS,
    OPT_350M,
    OPT_TINY,
    QWEN2_5_7B,
    QWEN3_0_6B,
    QWEN3_8B,
    SMOLLM2_135M,
    TINYLLAMA_1_1B,
    named,
)
from lightweight.models.loading import count_parameters, load, skeleton
from lightweight.models.model import Model, ModelError, Weights, first_line, ran_out, reason
from lightweight.models.quantized_checkpoint import check_forecastable, quantization_of, stored_quantization
from lightweight.models.sources import NoTokenizerError, can_be_random, find, find_tokenizer
from lightweight.models.tokenizer import check_rows, load_tokenizer
from lightweight.models.writing import drawn_tokenizer, write

__all__ = [
    "GPT_NEO_1_3B",
    "GPT_NEO_TINY",
    "LLAMA_3_1_8B",
    "LLAMA_3_2_1B",
    "LLAMA_TINY",
    "MODELS",
    "OPT_350M",
    "OPT_TINY",
    "QWEN2_5_7B",
    "QWEN3_0_6B",
    "QWEN3_8B",
    "SMOLLM2_135M",
    "TINYLLAMA_1_1B",
    "Model",
    "ModelError",
    "NoTokenizerError",
    "Weights",
    "can_be_random",
    "check_forecastable",
    "check_rows",
    "configuration",
    "configuration_beside_weights",
    "count_parameters",
    "drawn_tokenizer",
    "find",
    "find_tokenizer",
    "first_line",
    "flop_per_token",
    "load",
    "load_tokenizer",
    "longest_row",
    "named",
    "quantization_of",
    "ran_out",
    "reason",
    "skeleton",
    "stored_quantization",
    "write",
]
