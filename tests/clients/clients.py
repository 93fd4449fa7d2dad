"""The official Python clients against a node that serves the scripted model.

Arguments: HOST:PORT and the model's name. The node's key is "sesame".
"""

import json
import sys

import anthropic
import openai

ADDRESS, MODEL = sys.argv[1:3]
HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}
HELLO = "Hello, wörld!"


def openai_client(key="sesame"):
    return openai.OpenAI(base_url=f"http://{ADDRESS}/v1", api_key=key, max_retries=0)


def raises(kind, act):
    try:
        act()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def openai_chat():
    client = openai_client()
    assert [model.id for model in client.models.list()] == [MODEL]
    chat = client.chat.completions
    said = chat.create(model=MODEL, messages=HI, seed=7, logprobs=True, top_logprobs=2)
    assert said.choices[0].message.content == HELLO, said
    assert said.choices[0].finish_reason == "stop"
    assert said.usage.total_tokens == said.usage.prompt_tokens + 4
    assert "".join(token.token for token in said.choices[0].logprobs.content) == HELLO
    assert len(said.choices[0].logprobs.content[0].top_logprobs) == 2
    said = chat.create(model=MODEL, messages=HI, n=2, max_completion_tokens=2)
    assert [c.message.content for c in said.choices] == ["Hello, "] * 2
    assert {c.finish_reason for c in said.choices} == {"length"}

    text, usage, reason = "", None, None
    options = {"include_usage": True}
    for chunk in chat.create(model=MODEL, messages=HI, stream=True, stream_options=options):
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason or reason
        usage = chunk.usage or usage
    assert (text, reason, usage.completion_tokens) == (HELLO, "stop", 4)

    tools = [{"type": "function", "function": {"name": "add", "parameters": SCHEMA}}]
    said = chat.create(model=MODEL, messages=HI, tools=tools)
    message = said.choices[0].message
    assert said.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls[0].function.arguments == '{"a":2,"b":3}'
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "5"}
    said = chat.create(model=MODEL, messages=[*HI, message, result], tools=tools)
    assert said.choices[0].message.content == "The sum is 5."
    with chat.stream(model=MODEL, messages=HI, tools=tools) as stream:
        said = stream.get_final_completion()
    call = said.choices[0].message.tool_calls[0].function
    assert (call.name, call.arguments) == ("add", '{"a":2,"b":3}')

    said = client.completions.create(model=MODEL, prompt="x", max_tokens=3)
    assert said.choices[0].text == "la la la " and said.choices[0].finish_reason == "length"
    stream = client.completions.create(model=MODEL, prompt="x", max_tokens=16000, stream=True)
    assert next(iter(stream)).choices[0].text == "la "
    # The next request is answered only if this one ends with its connection.
    stream.close()
    assert chat.create(model=MODEL, messages=HI).choices[0].message.content == HELLO


def openai_errors():
    client = openai_client()
    chat = client.chat.completions
    error = raises(openai.NotFoundError, lambda: chat.create(model="none", messages=HI))
    assert error.code == "model_not_found" and error.request_id
    wrong = {"type": "xml"}
    act = lambda: chat.create(model=MODEL, messages=HI, response_format=wrong)
    assert raises(openai.BadRequestError, act).param == "response_format.type"
    form = json_schema({"type": "array", "items": {"type": "colour"}})
    act = lambda: chat.create(model=MODEL, messages=HI, response_format=form)
    error = raises(openai.BadRequestError, act)
    assert error.code == "grammar" and "at /items: " in error.message, error
    act = lambda: chat.create(model=MODEL, messages=HI, extra_body={"unknown": 1})
    assert raises(openai.BadRequestError, act).param == "unknown"
    act = lambda: openai_client("wrong").models.list()
    assert raises(openai.AuthenticationError, act).code == "invalid_api_key"


# The scripted model would say "Hello": it is held to what it would never say.
DIGIT = {"type": "integer", "minimum": 1, "maximum": 9}
FORM = {
    "type": "object",
    "properties": {"a": DIGIT, "b": {"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 2}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def json_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}


def fits(text):
    value = json.loads(text)
    assert list(value) == ["a", "b"] and len(value["b"]) == 2, text
    assert all(1 <= digit <= 9 for digit in [value["a"], *value["b"]]), text


def openai_forms():
    client = openai_client()
    chat = client.chat.completions
    for seed in range(3):
        ask = dict(model=MODEL, messages=HI, seed=seed, response_format=json_schema(FORM))
        said = chat.create(**ask)
        fits(said.choices[0].message.content)
        assert said.choices[0].finish_reason == "stop", said
        text = ""
        for chunk in chat.create(**ask, stream=True):
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        assert text == said.choices[0].message.content
    cut = chat.create(**ask, max_tokens=3)
    assert cut.choices[0].finish_reason == "length", cut
    said = chat.create(model=MODEL, messages=HI, response_format={"type": "json_object"}, n=2,
                       max_tokens=400)
    for choice in said.choices:
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
    regex = {"type": "regex", "regex": "[ab]{3}true"}
    said = chat.create(model=MODEL, messages=HI, extra_body={"response_format": regex})
    assert len(said.choices[0].message.content) == 7, said
    said = client.completions.create(model=MODEL, prompt="x", max_tokens=400,
                                     extra_body={"response_format": json_schema(FORM)})
    fits(said.choices[0].text)
    assert said.choices[0].finish_reason == "stop"
    form = {"type": "json_schema", "name": "n", "strict": True, "schema": FORM}
    said = client.responses.create(model=MODEL, input="Hi", store=False, text={"format": form})
    fits(said.output_text)
    assert said.status == "completed" and said.text.format.type == "json_schema"
    with client.responses.stream(model=MODEL, input="Hi", store=False, text={"format": form}) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
    fits(text)
    function = {"name": "add", "parameters": {**FORM, "required": ["a", "b"]}}
    tools = [{"type": "function", "function": {**function, "strict": strict}} for strict in (True, False)]
    for tool in tools:
        said = chat.create(model=MODEL, messages=HI, tools=[tool], tool_choice="required", seed=5)
        fits(said.choices[0].message.tool_calls[0].function.arguments)
        assert said.choices[0].finish_reason == "tool_calls"
    other = {"type": "function", "function": {**function, "name": "b"}}
    said = chat.create(model=MODEL, messages=HI, tools=[tool, other], tool_choice="required", seed=6)
    call = said.choices[0].message.tool_calls[0].function
    assert call.name in ("add", "b")
    fits(call.arguments)


def anthropic_client(key="sesame"):
    return anthropic.Anthropic(base_url=f"http://{ADDRESS}", api_key=key, max_retries=0)


def anthropic_messages():
    client = anthropic_client()
    ask = {"model": MODEL, "max_tokens": 100}
    said = client.messages.create(**ask, system="Be brief.", messages=HI)
    assert (said.content[0].text, said.stop_reason) == (HELLO, "end_turn"), said
    assert said.usage.output_tokens == 4 and said.usage.input_tokens > 0
    said = client.messages.create(**ask, messages=HI, stop_sequences=["wör"])
    assert (said.content[0].text, said.stop_reason) == ("Hello, ", "stop_sequence")
    assert said.stop_sequence == "wör"
    said = client.messages.create(model=MODEL, max_tokens=2, messages=HI)
    assert said.stop_reason == "max_tokens"
    with client.messages.stream(**ask, messages=HI) as stream:
        assert "".join(stream.text_stream) == HELLO
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn" and final.usage.output_tokens == 4

    tools = [{"name": "add", "input_schema": SCHEMA}]
    said = client.messages.create(**ask, messages=HI, tools=tools)
    assert [block.type for block in said.content] == ["text", "tool_use"]
    assert (said.content[1].input, said.stop_reason) == ({"a": 2, "b": 3}, "tool_use")
    result = {"type": "tool_result", "tool_use_id": said.content[1].id, "content": "5"}
    turns = [*HI, {"role": "assistant", "content": said.content}, {"role": "user", "content": [result]}]
    said = client.messages.create(**ask, messages=turns, tools=tools)
    assert said.content[0].text == "The sum is 5."
    with client.messages.stream(**ask, messages=HI, tools=tools) as stream:
        final = stream.get_final_message()
    assert final.content[1].input == {"a": 2, "b": 3} and final.stop_reason == "tool_use"
    choice = {"type": "tool", "name": "add"}
    said = client.messages.create(**ask, messages=HI, tools=tools, tool_choice=choice)
    assert said.content[0].input == {"a": 2, "b": 3}
    count = client.messages.count_tokens(model=MODEL, messages=HI)
    assert count.input_tokens > 0


def anthropic_forms():
    client = anthropic_client()
    ask = dict(model=MODEL, max_tokens=400, messages=HI)
    form = {"type": "json_schema", "schema": FORM}
    for field in [{"output_config": {"format": form}}, {"output_format": form}]:
        said = client.messages.create(**ask, extra_body=field)
        fits(said.content[0].text)
        assert said.stop_reason == "end_turn"
    tools = [{"name": "add", "input_schema": FORM, "strict": True}]
    choice = {"type": "any"}
    said = client.messages.create(**ask, tools=tools, tool_choice=choice)
    fits(json.dumps(said.content[0].input))
    with client.messages.stream(**ask, tools=tools, tool_choice=choice) as stream:
        fits(json.dumps(stream.get_final_message().content[0].input))
    cut = client.messages.create(model=MODEL, max_tokens=2, messages=HI, extra_body=field)
    assert cut.stop_reason == "max_tokens"


def anthropic_errors():
    client = anthropic_client()
    ask = {"max_tokens": 5, "messages": HI}
    raises(anthropic.NotFoundError, lambda: client.messages.create(model="none", **ask))
    image = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]
    act = lambda: client.messages.create(model=MODEL, max_tokens=5, messages=image)
    error = raises(anthropic.BadRequestError, act)
    assert error.body["error"]["type"] == "invalid_request_error"
    act = lambda: anthropic_client("wrong").messages.create(model=MODEL, **ask)
    raises(anthropic.AuthenticationError, act)


def openai_responses():
    client = openai_client()
    said = client.responses.create(model=MODEL, input="Hi", instructions="Be brief.", store=False)
    assert (said.output_text, said.status) == (HELLO, "completed"), said
    assert said.usage.output_tokens == 4
    said = client.responses.create(model=MODEL, input="Hi", max_output_tokens=2, store=False)
    assert said.status == "incomplete" and said.incomplete_details.reason == "max_output_tokens"
    tools = [{"type": "function", "name": "add", "parameters": SCHEMA, "strict": False}]
    said = client.responses.create(model=MODEL, input="Hi", tools=tools, store=False)
    call = said.output[-1]
    assert (call.type, call.name, call.arguments) == ("function_call", "add", '{"a":2,"b":3}')
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
    turns = [{"role": "user", "content": "Hi"}, *said.output, result]
    said = client.responses.create(model=MODEL, input=turns, tools=tools, store=False)
    assert said.output_text == "The sum is 5."
    text = ""
    with client.responses.stream(model=MODEL, input="Hi", tools=tools, store=False) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                text += event.delta
        final = stream.get_final_response()
    assert text == "Let me add." and final.output[-1].arguments == '{"a":2,"b":3}'
    act = lambda: client.responses.create(model=MODEL, input="Hi", store=True)
    assert raises(openai.BadRequestError, act).param == "store"


for test in [
    openai_chat,
    openai_errors,
    openai_forms,
    anthropic_forms,
    anthropic_messages,
    anthropic_errors,
    openai_responses,
]:
    print(test.__name__, flush=True)
    test()
print("all passed")
