"""Chat templates with a place for tools, written as the models' own are."""

_OPEN = "{% if add_generation_prompt %}<|assistant|>{% endif %}"

HERMES = (
    "<s>{% if tools %}You may call:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n"
    'Write <tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>{% endif %}'
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls %}{{ '\n' if not loop.first or message.content }}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}{% endfor %}" + _OPEN
)
"""The calls of Qwen 2.5 and 3."""

MISTRAL = (
    "<s>{% for message in messages %}{% if message.role == 'user' %}{% if tools %}"
    "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{{ message.content }}[/INST]{% elif message.role == 'tool' %}"
    "{% if message.tool_call_id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}"
    '[TOOL_RESULTS]{"content": {{ message.content | tojson }}, "call_id": '
    '"{{ message.tool_call_id }}"}[/TOOL_RESULTS]{% elif message.tool_calls %}[TOOL_CALLS] ['
    "{% for call in message.tool_calls %}{% if call.id | length != 9 %}"
    "{{ raise_exception('nine characters') }}{% endif %}{{ (call.function | tojson)[:-1] }}, "
    '"id": "{{ call.id }}"}{{ ", " if not loop.last }}{% endfor %}]</s>'
    "{% else %}{{ message.content }}</s>{% endif %}{% endfor %}"
)
"""The calls of Mistral 7B v0.3."""

LLAMA = (
    '<s>{% if tools %}<|system|>Respond in the format {"name": function name, "parameters": '
    "dictionary of argument name and its value}.{% for tool in tools %}\n{{ tool | tojson }}"
    "{% endfor %}{% endif %}{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.tool_calls %}{% if message.tool_calls | length != 1 %}"
    "{{ raise_exception('one call only') }}{% endif %}"
    '{"name": "{{ message.tool_calls[0].function.name }}", "parameters": '
    "{{ message.tool_calls[0].function.arguments | tojson }}}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}" + _OPEN
)
"""The calls of Llama 3.1 and 3.2."""
