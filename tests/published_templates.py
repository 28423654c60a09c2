"""Chat templates with all that published models' have: tools, dates, preambles, thoughts. Written for the tests after
what the models' own write of a conversation, with the loss marked by hand as in `chat_templates`."""

from chat_templates import THOUGHTS, WITHOUT_SYSTEM, Template

LLAMA_3_1 = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{ "Environment: ipython\\n" }}{% endif %}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {{- raise_exception("no tools here") }}
    {%- elif message.role in ("tool", "ipython") %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + message.content + "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN_2_5 = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN_3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thoughts = '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or thoughts) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
GEMMA_2 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}
{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}
""".replace("}\n", "}")
GEMMA_3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
"""
MISTRAL_V3 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL_V7 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- '[SYSTEM_PROMPT]' + messages[0]['content'] + '[/SYSTEM_PROMPT]' }}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {{- '[SYSTEM_PROMPT]You are an assistant.[/SYSTEM_PROMPT]' }}
    {%- set loop_messages = messages %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST]' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
PHI_3 = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}
{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'user' %}
{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'assistant' %}
{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}
""".replace("}\n", "}")
PHI_4 = """{% for message in messages %}{% if (message['role'] == 'system') %}
{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}
{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}
{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}
""".replace("}\n", "}")
GRANITE_3 = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = "Knowledge Cutoff Date: April 2024.\\nYou are Granite." %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}
{%- for message in loop_messages %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}
"""
COMMAND_R = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}
{% set system_message = false %}{% endif %}{% if system_message != false %}
{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system_message + '<|END_OF_TURN_TOKEN|>' }}{% endif %}
{% for message in loop_messages %}{% set content = message['content'] %}{% if message['role'] == 'user' %}
{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{% elif message['role'] == 'assistant' %}
{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'  + content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}
""".replace("}\n", "}")
DEEPSEEK_V3 = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}
{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}
{%- if message['role'] == 'assistant' %}
{{'<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}
{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}
""".replace("}\n", "}")
DEEPSEEK_R1 = DEEPSEEK_V3.replace(
    "message['content'] + '<｜end", "message['content'].split('</think>')[-1] + '<｜end"
).replace("{{'<｜Assistant｜>'}}{% endif", "{{'<｜Assistant｜><think>\\n'}}{% endif")
SMOLLM3 = """{%- if messages[0].role == "system" %}
    {%- set custom_instructions = messages[0].content.replace("/no_think", "").rstrip() %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set custom_instructions = "You are a helpful AI assistant named SmolLM." %}
{%- endif %}
{{- "<|im_start|>system\\n## Metadata\\n\\nReasoning Mode: /no_think\\n\\n## Custom Instructions\\n\\n" }}
{{- custom_instructions + "\\n\\n<|im_end|>\\n" }}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- "<|im_start|>user\\n" + message.content + "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" %}
        {% generation %}
        {{- "<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n" + message.content + "<|im_end|>\\n" }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n" }}
{%- endif %}
"""
OLMO_2 = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + '\\n' }}{% elif message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + '\\n' }}{% elif message['role'] == 'assistant' %}{% if not loop.last %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token + '\\n' }}{% else %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}{% endif %}{% endif %}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}
""".replace("}\n", "}")
GPT_OSS = """{{- "<|start|>system<|message|>You are ChatGPT.\\n\\n# Valid channels: analysis, final.<|end|>" }}
{%- for message in messages %}
    {%- if message.role == "system" %}
        {{- "<|start|>developer<|message|># Instructions\\n\\n" + message.content + "<|end|>" }}
    {%- elif message.role == "user" %}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- elif loop.last and not add_generation_prompt %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
    {%- else %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|start|>assistant" }}
{%- endif %}
"""
LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}
{% set system_message = false %}{% endif %}{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}
""".replace("}\n", "}")
MISTRAL_NEMO = """{{- bos_token }}
{%- for message in messages %}
    {%- if message["role"] == "user" %}
        {{- "[INST]" + message["content"] + "[/INST]" }}
    {%- elif message["role"] == "assistant" %}
        {{- message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
GLM_4 = """[gMASK]<sop>{% for item in messages %}
<|{{ item['role'] }}|>\n{{ item['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}
""".replace("}\n", "}").replace("\\n", "\n")

PUBLISHED = {
    "Llama 3.1, whose system message has a date": Template(
        LLAMA_3_1,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Hello 그래.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Sleep.<|eot_id|>»",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    "Qwen2.5, with a system message of its own": Template(
        QWEN_2_5,
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
        "<|im_start|>assistant\n«Hello 그래.<|im_end|>»\n<|im_start|>user\nAnd now?<|im_end|>\n"
        "<|im_start|>assistant\n«Sleep.<|im_end|>»\n",
        eos="<|im_end|>",
        talk=WITHOUT_SYSTEM,
    ),
    "Gemma 2": Template(
        GEMMA_2,
        "<bos><start_of_turn>user\nHi.<end_of_turn>\n<start_of_turn>model\n«Hello 그래.<end_of_turn>»\n"
        "<start_of_turn>user\nAnd now?<end_of_turn>\n<start_of_turn>model\n«Sleep.<end_of_turn>»\n",
        bos="<bos>",
        eos="<eos>",
        talk=WITHOUT_SYSTEM,
    ),
    "Gemma 3": Template(
        GEMMA_3,
        "<bos><start_of_turn>user\nBe kind.\n\nHi.<end_of_turn>\n<start_of_turn>model\n«Hello 그래.<end_of_turn>»\n"
        "<start_of_turn>user\nAnd now?<end_of_turn>\n<start_of_turn>model\n«Sleep.<end_of_turn>»\n",
        bos="<bos>",
        eos="<eos>",
    ),
    "Mistral v3": Template(
        MISTRAL_V3,
        "<s>[INST] Hi.[/INST]« Hello 그래.</s>»[INST] And now?[/INST]« Sleep.</s>»",
        bos="<s>",
        talk=WITHOUT_SYSTEM,
    ),
    "Llama 2, which begins each turn anew": Template(
        LLAMA_2,
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi. [/INST]« Hello 그래. </s>»"
        "<s>[INST] And now? [/INST]« Sleep. </s>»",
        bos="<s>",
    ),
    "Mistral Nemo": Template(
        MISTRAL_NEMO,
        "<s>[INST]Hi.[/INST]«Hello 그래.</s>»[INST]And now?[/INST]«Sleep.</s>»",
        bos="<s>",
        talk=WITHOUT_SYSTEM,
    ),
    "GLM-4, whose turns end where another begins": Template(
        GLM_4,
        "[gMASK]<sop><|system|>\nBe kind.<|user|>\nHi.<|assistant|>«\nHello 그래.»"
        "<|user|>\nAnd now?<|assistant|>«\nSleep.»",
        eos="<|endoftext|>",
        is_ended=False,
    ),
    "Mistral v7": Template(
        MISTRAL_V7,
        "<s>[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT][INST]Hi.[/INST]«Hello 그래.</s>»[INST]And now?[/INST]«Sleep.</s>»",
        bos="<s>",
    ),
    "Phi-3": Template(
        PHI_3,
        "<s><|system|>\nBe kind.<|end|>\n<|user|>\nHi.<|end|>\n<|assistant|>\n«Hello 그래.<|end|>»\n"
        "<|user|>\nAnd now?<|end|>\n<|assistant|>\n«Sleep.<|end|>»\n<|endoftext|>",
        bos="<s>",
        eos="<|endoftext|>",
    ),
    "Phi-4": Template(
        PHI_4,
        "<|im_start|>system<|im_sep|>Be kind.<|im_end|><|im_start|>user<|im_sep|>Hi.<|im_end|>"
        "<|im_start|>assistant<|im_sep|>«Hello 그래.<|im_end|>»<|im_start|>user<|im_sep|>And now?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>«Sleep.<|im_end|>»",
        eos="<|im_end|>",
    ),
    "Granite 3": Template(
        GRANITE_3,
        "<|start_of_role|>system<|end_of_role|>Be kind.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Hi.<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>«Hello 그래.<|end_of_text|>»\n"
        "<|start_of_role|>user<|end_of_role|>And now?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>«Sleep.<|end_of_text|>»\n",
        eos="<|end_of_text|>",
    ),
    "Command R": Template(
        COMMAND_R,
        "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be kind.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>«Hello 그래.<|END_OF_TURN_TOKEN|>»"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>And now?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>«Sleep.<|END_OF_TURN_TOKEN|>»",
        bos="<s>",
        eos="<|END_OF_TURN_TOKEN|>",
    ),
    "DeepSeek-V3": Template(
        DEEPSEEK_V3,
        "<s>Be kind.<｜User｜>Hi.<｜Assistant｜>«Hello 그래.<｜end▁of▁sentence｜>»"
        "<｜User｜>And now?<｜Assistant｜>«Sleep.<｜end▁of▁sentence｜>»",
        bos="<s>",
        eos="<｜end▁of▁sentence｜>",
    ),
    "OLMo 2": Template(
        OLMO_2,
        "<|endoftext|><|system|>\nBe kind.\n<|user|>\nHi.\n<|assistant|>\n«Hello 그래.<|endoftext|>»\n"
        "<|user|>\nAnd now?\n<|assistant|>\n«Sleep.<|endoftext|>»",
        bos="<|endoftext|>",
        eos="<|endoftext|>",
    ),
}

WIDER = {
    "SmolLM3, which marks the assistant's name too": Template(
        SMOLLM3,
        "<|im_start|>system\n## Metadata\n\nReasoning Mode: /no_think\n\n## Custom Instructions\n\nBe kind.\n\n"
        "<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
        "«<|im_start|>assistant\n<think>\n\n</think>\n\nHello 그래.<|im_end|>\n»<|im_start|>user\nAnd now?<|im_end|>\n"
        "«<|im_start|>assistant\n<think>\n\n</think>\n\nSleep.<|im_end|>\n»",
        eos="<|im_end|>",
    ),
}
"""Those whose marks begin before an answer, or end after it."""

LAST_ALONE = {
    "Qwen3, which takes thoughts out": Template(
        QWEN_3,
        "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\nLate.\n</think>\n\nSleep.<|im_end|>»\n",
        eos="<|im_end|>",
        talk=THOUGHTS,
    ),
    "Qwen3, which writes that there are none": Template(
        QWEN_3,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
        "<|im_start|>assistant\nHello 그래.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\n\n</think>\n\nSleep.<|im_end|>»\n",
        eos="<|im_end|>",
    ),
    "gpt-oss, which ends the last turn differently": Template(
        GPT_OSS,
        "<|start|>system<|message|>You are ChatGPT.\n\n# Valid channels: analysis, final.<|end|>"
        "<|start|>developer<|message|># Instructions\n\nBe kind.<|end|><|start|>user<|message|>Hi.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hello 그래.<|end|><|start|>user<|message|>And now?<|end|>"
        "<|start|>assistant«<|channel|>final<|message|>Sleep.<|return|>»",
        eos="<|return|>",
    ),
}
"""Those whose earlier turns are written otherwise while they are the last: the loss is marked on that one."""

NEVER = {
    "Gemma 2, to which no system message is said": (Template(GEMMA_2, "", bos="<bos>"), "System role not supported"),
    "DeepSeek-R1, whose prompt begins a thought that its turns do not have": (
        Template(DEEPSEEK_R1, "", bos="<s>", eos="<｜end▁of▁sentence｜>"),
        "it writes the last turn differently after its prompt",
    ),
    "Mistral v3, whose system message is in the last of the user's turns": (
        Template(MISTRAL_V3, "", bos="<s>"),
        "it leaves out what the system says",
    ),
}
"""Those that are refused, with the reason."""
