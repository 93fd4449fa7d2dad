// The official JavaScript clients against a node that serves the scripted model.
// Arguments: HOST:PORT and the model's name. The node's key is "sesame".

import assert from "node:assert/strict";

import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const [address, model] = process.argv.slice(2);
const messages = [{ role: "user", content: "Hi" }];
const parameters = { type: "object", properties: { a: { type: "number" }, b: { type: "number" } } };
const HELLO = "Hello, wörld!";
const openai = (apiKey = "sesame") =>
    new OpenAI({ baseURL: `http://${address}/v1`, apiKey, maxRetries: 0 });
const anthropic = (apiKey = "sesame") =>
    new Anthropic({ baseURL: `http://${address}`, apiKey, maxRetries: 0 });

async function chats() {
    const chat = openai().chat.completions;
    const said = await chat.create({ model, messages });
    assert.equal(said.choices[0].message.content, HELLO);
    let text = "";
    let usage;
    const streamed = { model, messages, stream: true, stream_options: { include_usage: true } };
    for await (const chunk of await chat.create(streamed)) {
        text += chunk.choices[0]?.delta?.content ?? "";
        usage = chunk.usage ?? usage;
    }
    assert.deepEqual([text, usage.completion_tokens], [HELLO, 4]);
    const tools = [{ type: "function", function: { name: "add", parameters } }];
    const final = await chat.stream({ model, messages, tools }).finalChatCompletion();
    const call = final.choices[0].message.tool_calls[0];
    assert.deepEqual(JSON.parse(call.function.arguments), { a: 2, b: 3 });
    const result = { role: "tool", tool_call_id: call.id, content: "5" };
    const turns = [...messages, final.choices[0].message, result];
    const answer = await chat.create({ model, messages: turns, tools });
    assert.equal(answer.choices[0].message.content, "The sum is 5.");

    const ends = new AbortController();
    const endless = { model, prompt: "x", max_tokens: 16000, stream: true };
    const stream = await openai().completions.create(endless, { signal: ends.signal });
    for await (const chunk of stream) {
        assert.equal(chunk.choices[0].text, "la ");
        break;
    }
    ends.abort();
    assert.equal((await chat.create({ model, messages })).choices[0].message.content, HELLO);
    await assert.rejects(chat.create({ model: "none", messages }), OpenAI.NotFoundError);
    await assert.rejects(openai("wrong").models.list(), OpenAI.AuthenticationError);
    await assert.rejects(
        chat.create({ model, messages, response_format: { type: "xml" } }),
        (error) => error instanceof OpenAI.BadRequestError && error.param === "response_format.type",
    );
    const digit = { type: "integer", minimum: 1, maximum: 9 };
    const schema = {
        type: "object",
        properties: { a: digit },
        required: ["a"],
        additionalProperties: false,
    };
    const form = { type: "json_schema", json_schema: { name: "n", strict: true, schema } };
    const held = await chat.create({ model, messages, response_format: form });
    assert.equal(typeof JSON.parse(held.choices[0].message.content).a, "number");
    const format = { type: "json_schema", name: "n", strict: true, schema };
    const response = await openai().responses.create({
        model, input: "Hi", store: false, text: { format },
    });
    assert.equal(typeof JSON.parse(response.output_text).a, "number");
}

async function claude() {
    const ask = { model, max_tokens: 100, messages };
    const said = await anthropic().messages.create(ask);
    assert.deepEqual([said.content[0].text, said.stop_reason], [HELLO, "end_turn"]);
    const tools = [{ name: "add", input_schema: parameters }];
    const final = await anthropic().messages.stream({ ...ask, tools }).finalMessage();
    assert.deepEqual(final.content[1].input, { a: 2, b: 3 });
    assert.equal(final.stop_reason, "tool_use");
    const result = { type: "tool_result", tool_use_id: final.content[1].id, content: "5" };
    const turns = [
        ...messages,
        { role: "assistant", content: final.content },
        { role: "user", content: [result] },
    ];
    const answer = await anthropic().messages.create({ ...ask, messages: turns, tools });
    assert.equal(answer.content[0].text, "The sum is 5.");
    await assert.rejects(
        anthropic().messages.create({ ...ask, model: "none" }),
        Anthropic.NotFoundError,
    );
    await assert.rejects(anthropic("wrong").messages.create(ask), Anthropic.AuthenticationError);
}

async function responses() {
    const said = await openai().responses.create({ model, input: "Hi", store: false });
    assert.equal(said.output_text, HELLO);
    let text = "";
    const streamed = { model, input: "Hi", store: false, stream: true };
    for await (const event of await openai().responses.create(streamed)) {
        if (event.type === "response.output_text.delta") text += event.delta;
    }
    assert.equal(text, HELLO);
}

for (const test of [chats, claude, responses]) {
    console.log(test.name);
    await test();
}
console.log("all passed");
