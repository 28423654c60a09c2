"""Chat templates that people use, written for the tests, and a tokenizer that has their special tokens.

What the loss is on is marked by hand: `«` and `»` are around it in what a template writes of TALK.
"""

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightweight.corpus import Conversation, Message

SPECIAL = (
    *("<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    *("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|im_sep|>", "<|START_OF_TURN_TOKEN|>"),
    *(
        "<|END_OF_TURN_TOKEN|>",
        "<|SYSTEM_TOKEN|>",
        "<|USER_TOKEN|>",
        "<|CHATBOT_TOKEN|>",
        "<｜User｜>",
        "<｜Assistant｜>",
    ),
    *("<｜end▁of▁sentence｜>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<eos>"),
)


def tokenizer(template: str | None, *, bos: str | None = None, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """Bytes, some pairs of them, and the special tokens of all templates, as a fast tokenizer; one pair joins what two
    turns have side by side."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ċ", "Ċ"), ("Ġ", "H"), (".", "Ċ")]
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos)
    found.add_special_tokens({"additional_special_tokens": [t for t in SPECIAL if t not in (bos, eos)]})
    found.chat_template = template
    return found


TALK = Conversation(
    (
        Message("system", "Be kind."),
        Message("user", "Hi."),
        Message("assistant", "Hello 그래."),
        Message("user", "And now?"),
        Message("assistant", "Sleep."),
    )
)
WITHOUT_SYSTEM = Conversation(TALK.messages[1:])


@dataclass(frozen=True)
class Template:
    """A template with its tokenizer's ends, and what it writes of `talk` with the loss marked."""

    template: str
    written: str
    bos: str | None = None
    eos: str = "</s>"
    talk: Conversation = TALK
    is_ended: bool = True


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED_WITHOUT_ENDS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}"
    "{% if loop.last and add_generation_prompt %}{{ '\n<|assistant|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '### Response:\n' + m.content + '\n\n' }}"
    "{% else %}{{ '### Instruction:\n' + m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
_THINKING = (
    "{%% set ns = namespace(last=0) %%}"
    "{%% for m in messages %%}{%% if m.role == 'user' %%}{%% set ns.last = loop.index0 %%}{%% endif %%}{%% endfor %%}"
    "{%% for m in messages %%}{{ '<|im_start|>' + m.role + '\n' }}{%% if m.role == 'assistant' %%}%s"
    "{%% if loop.index0 > ns.last and '<think>' not in m.content %%}{{ '<think>\n\n</think>\n\n' + m.content }}"
    "{%% elif loop.index0 > ns.last %%}{{ m.content }}"
    "{%% else %%}{{ m.content.split('</think>')[-1].lstrip('\n') }}{%% endif %%}{{ '<|im_end|>' }}%s{{ '\n' }}"
    "{%% else %%}{{ m.content + '<|im_end|>\n' }}{%% endif %%}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\n' }}{%% endif %%}"
)
THINKING = _THINKING % ("", "")
THINKING_MARKED = _THINKING % ("{% generation %}", "{% endgeneration %}")
UNSTABLE = "{{ messages | length }} messages\n" + CHATML
"""Which says at its beginning how many messages there are."""

THOUGHTS = Conversation(
    (
        Message("user", "Hi."),
        Message("assistant", "<think>\nA guest.\n</think>\n\nHello."),
        Message("user", "And now?"),
        Message("assistant", "<think>\nLate.\n</think>\n\nSleep."),
    )
)

_CHATML_WRITTEN = (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
    "<|im_start|>assistant\n«Hello 그래.<|im_end|>»\n<|im_start|>user\nAnd now?<|im_end|>\n"
    "<|im_start|>assistant\n«Sleep.<|im_end|>»\n"
)

TEMPLATES = {
    "ChatML": Template(CHATML, _CHATML_WRITTEN, eos="<|im_end|>"),
    "ChatML, marked": Template(CHATML_MARKED, _CHATML_WRITTEN, eos="<|im_end|>"),
    "ChatML, marked without ends": Template(CHATML_MARKED_WITHOUT_ENDS, _CHATML_WRITTEN, eos="<|im_end|>"),
    "ChatML whose end is not the tokenizer's": Template(CHATML, _CHATML_WRITTEN, eos="<|endoftext|>"),
    "Llama 3": Template(
        LLAMA_3,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Hello 그래.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Sleep.<|eot_id|>»",
        bos="<|begin_of_text|>",
    ),
    "Gemma, which moves the system message": Template(
        GEMMA,
        "<bos><start_of_turn>user\nBe kind.\n\nHi.<end_of_turn>\n<start_of_turn>model\n«Hello 그래.<end_of_turn>»\n"
        "<start_of_turn>user\nAnd now?<end_of_turn>\n<start_of_turn>model\n«Sleep.<end_of_turn>»\n",
        bos="<bos>",
    ),
    "Mistral": Template(
        MISTRAL,
        "<s>[INST] Hi. [/INST]« Hello 그래.</s>»[INST] And now? [/INST]« Sleep.</s>»",
        bos="<s>",
        talk=WITHOUT_SYSTEM,
    ),
    "Phi, which ends all text": Template(
        PHI,
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi.<|end|>\n<|assistant|>\n«Hello 그래.<|end|>»\n"
        "<|user|>\nAnd now?<|end|>\n<|assistant|>\n«Sleep.<|end|>»\n<|endoftext|>",
        eos="<|endoftext|>",
    ),
    "Zephyr": Template(
        ZEPHYR,
        "<|system|>\nBe kind.</s>\n<|user|>\nHi.</s>\n<|assistant|>\n«Hello 그래.</s>»\n"
        "<|user|>\nAnd now?</s>\n<|assistant|>\n«Sleep.</s>»\n",
    ),
    "Alpaca, which ends a turn with no special token": Template(
        ALPACA,
        "### Instruction:\nBe kind.\n\n### Instruction:\nHi.\n\n### Response:\n«Hello 그래.\n\n»"
        "### Instruction:\nAnd now?\n\n### Response:\n«Sleep.\n\n»",
        is_ended=False,
    ),
    "thoughts, marked": Template(
        THINKING_MARKED,
        "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n«Hello.<|im_end|>»\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\nLate.\n</think>\n\nSleep.<|im_end|>»\n",
        talk=THOUGHTS,
    ),
}
