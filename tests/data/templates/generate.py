"""Renders the templates here with Jinja2, set up as Transformers' chat_template_utils does, and writes
cases.json. Run it with Python 3 and jinja2 3.1: python3 generate.py
"""
import datetime
import json
import pathlib

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = pathlib.Path(__file__).parent
NOW = 1_796_023_013
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


class Generation(Extension):
    """Transformers' tag that marks an assistant's text; it changes nothing here."""

    tags = {"generation"}

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(lineno)


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(form):
    return datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc).strftime(form)


def environment():
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


def render(name, messages, tools, thinking):
    template = environment().from_string((HERE / f"{name}.jinja").read_text())
    more = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
    return template.render(
        messages=messages, tools=tools or None, documents=None, add_generation_prompt=True, **more, **TOKENS)


def said(role, content, **more):
    return {"role": role, "content": content, **more}


TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "The weather at a place, <now>.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer", "default": 1}},
                   "required": ["place"]}}}]
CALL = said("assistant", "", tool_calls=[{"id": "abcdef123", "type": "function",
            "function": {"name": "weather", "arguments": {"place": "Zürich", "days": 2}}}])
RESULT = said("tool", "12.5", tool_call_id="abcdef123")
HELLO = [said("user", " Hello, \u201cyou\u201d!  ")]
TURNS = [said("user", "What is 2 + 2?"), said("assistant", "<think>\nfour\n</think>\n\nIt is 4. "), said("user", "And 🐳 <b>&amp;</b>?")]
CONVERSATIONS = {
    "hello": (HELLO, [], None),
    "system": ([said("system", "Be brief.\n")] + HELLO, [], None),
    "turns": ([said("system", "Be brief.")] + TURNS, [], None),
    "no thinking": (TURNS, [], False),
    "thinking": (TURNS, [], True),
    "tools": ([said("system", "Use tools.")] + HELLO, TOOLS, None),
    "tool result": ([said("user", "Weather?"), CALL, RESULT], TOOLS, None),
    "wrong order": ([said("assistant", "I begin."), said("user", "No.")], [], None),
    "two calls": ([said("user", "Weather?"), {**CALL, "tool_calls": CALL["tool_calls"] * 2}], [], None),
    "list": ([said("user", [{"type": "text", "text": " Look "}, {"type": "image"}])], [], None),
    "odd roles": (HELLO + [said("skip", "x"), {"role": "other"}, said("stop", "y"), said("user", "z")], [], None),
}
WANTED = {
    "chatml": ["hello", "system", "turns", "no thinking", "thinking", "tools", "tool result", "list"],
    "llama3": ["hello", "system", "turns", "tools", "tool result", "two calls"],
    "gemma": ["hello", "system", "turns", "wrong order", "list"],
    "mistral": ["hello", "system", "turns", "tools", "tool result", "wrong order"],
    "smol": ["hello", "turns", "no thinking", "odd roles"],
}


def main():
    cases = []
    for template, names in WANTED.items():
        for name in names:
            messages, tools, thinking = CONVERSATIONS[name]
            case = {"template": template, "case": name, "messages": messages}
            if tools:
                case["tools"] = tools
            if thinking is not None:
                case["thinking"] = thinking
            try:
                case["expected"] = render(template, messages, tools, thinking)
            except jinja2.exceptions.TemplateError as error:
                case["refused"] = str(error)
            cases.append(case)
    text = json.dumps({"now": NOW, "tokens": TOKENS, "cases": cases}, ensure_ascii=False, indent=1)
    (HERE / "cases.json").write_text(text + "\n")
    print(len(cases), "cases")


main()
