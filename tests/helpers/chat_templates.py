"""Chat templates in the manner of well-known models, and what each trains on; written for tests, not copied.

`EXPECTED[name]` are the assistant's parts of `TALK` as that template renders them.
"""

TALK = [
    {"role": "user", "content": "what is a kidney stone"},
    {"role": "assistant", "content": " a hard piece "},
    {"role": "user", "content": "and the mat?"},
    {"role": "assistant", "content": "the cat sat"},
]

# With a thought, as Qwen 3's are written.
THOUGHTFUL = [
    {"role": "user", "content": "what is a kidney stone"},
    {"role": "assistant", "content": "<think>\nthe cat\n</think>\n\na hard piece"},
]

_LOOP = "{% for m in messages %}"
_NAMED = "{% if add_generation_prompt %}"

TEMPLATES = {
    "chatml": _LOOP
    + "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    + _NAMED
    + "<|im_start|>assistant\n{% endif %}",
    "llama3": "{{ bos_token }}"
    + _LOOP
    + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    + _NAMED
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "mistral": "{{ bos_token }}"
    + _LOOP
    + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content | trim }}{{ eos_token }}"
    + "{% endif %}{% endfor %}",
    # Qwen 3: thoughts of turns before the last question are taken out, the last turn gets an empty one.
    "thinking": "{% set ns = namespace(last=0) %}"
    + _LOOP
    + "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    + _LOOP
    + "{% set answer = m.content.split('</think>')[-1].lstrip('\\n') %}{{ '<|im_start|>' + m.role + '\\n' }}"
    + "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\\n\\n</think>\\n\\n' + answer }}"
    + "{% elif m.role == 'assistant' %}{{ answer }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}"
    + "{% endfor %}"
    + _NAMED
    + "<|im_start|>assistant\n{% endif %}",
    # Qwen 3 as mlx-lm uses it: without thinking, the prompt for an answer closes an empty thought. After the last
    # question, the last message and those with a thought keep one; a thought may have a key of its own.
    "switchable": "{% set ns = namespace(last=0) %}"
    + _LOOP
    + "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    + _LOOP
    + "{% set parts = (m.content or '').split('</think>') %}{% set answer = parts[-1].lstrip('\n') %}"
    + "{% set thought = m.reasoning_content or (parts[0].split('<think>')[-1].strip('\n') if parts[1:] else '') %}"
    + "{{ '<|im_start|>' + m.role + '\n' }}"
    + "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
    + "{{ '<think>\n' + thought + '\n</think>\n\n' + answer }}"
    + "{% elif m.role == 'tool' %}{{ '<tool_response>' + m.content + '</tool_response>' }}"
    + "{% else %}{{ answer }}{% endif %}"
    + "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name + '</tool_call>' }}{% endfor %}"
    + "{{ '<|im_end|>\n' }}{% endfor %}"
    + _NAMED
    + "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    + "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
    # DeepSeek R1: the prompt for an answer opens a thought, answers are kept without.
    "opened": "{{ bos_token }}"
    + _LOOP
    + "{% if m.role == 'user' %}<User>{{ m.content }}{% else %}<Assistant>{{ m.content }}{{ eos_token }}{% endif %}"
    + "{% endfor %}"
    + _NAMED
    + "<Assistant><think>\n{% endif %}",
    # Only the last answer is kept as it is.
    "shortened": _LOOP
    + "{{ m.role + ': ' }}{% if m.role == 'assistant' and not loop.last %}{{ m.content[:4] }}{% else %}{{ m.content }}"
    + "{% endif %}{{ '\\n' }}{% endfor %}"
    + _NAMED
    + "{{ 'assistant: ' }}{% endif %}",
    # Nothing tells where an answer begins.
    "counted": "{% for m in messages | reverse %}{{ loop.length }} {{ m.content | length }} {{ m.content | upper }}\n"
    + "{% endfor %}",
}

EXPECTED = {
    "gemma": ["a hard piece<end_of_turn>\n", "the cat sat<end_of_turn>\n"],
    "chatml": [" a hard piece <|im_end|>\n", "the cat sat<|im_end|>\n"],
    "llama3": ["a hard piece<|eot_id|>", "the cat sat<|eot_id|>"],
    "mistral": [" a hard piece<eos>", " the cat sat<eos>"],
    "thinking": [" a hard piece <|im_end|>\n", "<think>\n\n</think>\n\nthe cat sat<|im_end|>\n"],
    "switchable": [" a hard piece <|im_end|>\n", "the cat sat<|im_end|>\n"],
    "opened": [" a hard piece <eos>", "the cat sat<eos>"],
    "shortened": ["the cat sat\n"],
}
