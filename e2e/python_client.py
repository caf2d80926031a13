"""What a user of the OpenAI client does: chat, stream, completions, logprobs, n=2, and an error."""

import math
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="none", timeout=120, max_retries=0)

assert [model.id for model in client.models.list()] == ["demo"]

messages = [{"role": "user", "content": "In the beginning God created"}]
chat = client.chat.completions.create(model="demo", messages=messages, max_tokens=8, temperature=0)
assert chat.choices[0].message.role == "assistant"
assert chat.choices[0].finish_reason in ("length", "stop")
assert chat.usage.completion_tokens <= 8 and chat.usage.prompt_tokens > 0

pieces, usage = [], None
stream = client.chat.completions.create(
    model="demo", messages=messages, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
)
for chunk in stream:
    if chunk.choices and chunk.choices[0].delta.content:
        pieces.append(chunk.choices[0].delta.content)
    usage = chunk.usage or usage
assert "".join(pieces) == chat.choices[0].message.content, (pieces, chat)
assert usage.completion_tokens == chat.usage.completion_tokens

logged = client.chat.completions.create(
    model="demo", messages=messages, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
)
for entry in logged.choices[0].logprobs.content:
    assert len(entry.top_logprobs) == 3
    best = entry.top_logprobs[0]
    assert math.isclose(best.logprob, entry.logprob, abs_tol=1e-6), entry
    assert entry.logprob <= 0

two = client.chat.completions.create(model="demo", messages=messages, max_tokens=8, temperature=1, seed=3, n=2)
assert [choice.index for choice in two.choices] == [0, 1]
again = client.chat.completions.create(model="demo", messages=messages, max_tokens=8, temperature=1, seed=3, n=2)
texts = [choice.message.content for choice in two.choices]
assert texts == [choice.message.content for choice in again.choices], "a seed repeats"
assert texts[0] != texts[1], "choices differ"

text = client.completions.create(
    model="demo", prompt=["And God said", "import os"], max_tokens=6, temperature=0, logprobs=2, echo=True
)
assert len(text.choices) == 2
assert text.choices[0].text.startswith("And God said")
assert text.choices[0].logprobs.token_logprobs[0] is None
assert len(text.choices[0].logprobs.tokens) == len(text.choices[0].logprobs.token_logprobs)
streamed = "".join(
    chunk.choices[0].text
    for chunk in client.completions.create(model="demo", prompt="And God said", max_tokens=6, temperature=0, stream=True)
)
assert "And God said" + streamed == text.choices[0].text, (streamed, text)

try:
    client.chat.completions.create(model="absent", messages=messages)
except openai.NotFoundError as error:
    assert "absent" in str(error)
else:
    raise AssertionError("an unknown model is an error")
print("ok")
