"""`template.render` as a Jinja chat template, saved with the tokenizer for `transformers` and vLLM.

It gives the same ids for messages in OpenAI's form, with one exception: a content whose leading white space
holds a newline merges with the header's newlines, for `transformers` tokenizes header and content as one
string. (Control tokens typed in a content also become control tokens there: `transformers` cannot tell them
apart.)
"""

CHAT_TEMPLATE = """\
{%- set built_in = ['brave_search', 'wolfram_alpha', 'code_interpreter'] -%}
{%- set searches = (tools or []) | selectattr('type', 'in', built_in[:2]) | map(attribute='type') | list -%}
{%- set functions = (tools or []) | rejectattr('type', 'in', built_in) | map(attribute='function') | list -%}
{{- bos_token -}}
{%- set has_system = messages and messages[0].role in ['system', 'developer'] -%}
{%- if has_system or tools -%}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}
    {%- if tools -%}
        {{- 'Environment: ipython\\n' + ('Tools: ' + searches | join(', ') if searches else '') + '\\n' -}}
    {%- endif -%}
    {{- messages[0].content if has_system else '' -}}
    {{- '<|eot_id|>' -}}
{%- endif -%}
{%- if functions -%}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {{- "Answer the user's question by making use of the following functions if needed.\\n" -}}
    {{- 'If none of the function can be used, please say so.\\n' -}}
    {{- 'Here is a list of functions in JSON format:\\n' -}}
    {%- for function in functions -%}
        {%- set schema = function.parameters or {} -%}
        {{- '{\\n    "type": "function",\\n    "function": {\\n        "name": ' + function.name | tojson -}}
        {{- ',\\n        "description": ' + (function.description or '') | tojson -}}
        {{- ',\\n        "parameters": {\\n            "type": "object",\\n            "properties": [' -}}
        {%- for name, property in (schema.properties or {}).items() -%}
            {{- '\\n                ' + {name: property} | tojson(indent=4) | indent(16) -}}
            {{- '' if loop.last else ',' -}}
        {%- endfor -%}
        {{- '\\n            ],\\n            "required": ' + (schema.required or []) | tojson -}}
        {{- '\\n        }\\n    }\\n}\\n' -}}
    {%- endfor -%}
    {{- '\\nReturn function calls in JSON format.<|eot_id|>' -}}
{%- endif -%}
{%- set conversation = messages[1:] if has_system else messages -%}
{%- for message in conversation -%}
    {%- set role = 'ipython' if message.role in ['tool', 'function'] else message.role -%}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + (message.content or '') -}}
    {%- if message.tool_calls -%}
        {%- set call = message.tool_calls[0].function or message.tool_calls[0] -%}
        {{- '<|python_tag|>' -}}
        {%- if call.name == 'code_interpreter' -%}
            {{- call.arguments if call.arguments is string else call.arguments.code -}}
        {%- elif call.name in built_in[:2] -%}
            {{- call.name + '.call(query="' + call.arguments.query + '")' -}}
        {%- else -%}
            {{- {'type': 'function', 'name': call.name, 'parameters': call.arguments} | tojson(indent=4) -}}
        {%- endif -%}
    {%- endif -%}
    {%- set goes_on = loop.nextitem is defined and loop.nextitem.role not in ['user', 'system'] -%}
    {{- '<|eom_id|>' if role == 'assistant' and (message.tool_calls or goes_on) else '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
