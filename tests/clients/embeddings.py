"""The official Python client's embeddings against a node that serves an embedding model.

Arguments: HOST:PORT and the model's name. The node's key is "sesame".
"""

import array
import sys

import openai

ADDRESS, MODEL = sys.argv[1:3]
client = openai.OpenAI(base_url=f"http://{ADDRESS}/v1", api_key="sesame", max_retries=0)
# The client asks for base64 unless it is told otherwise.
packed = client.embeddings.create(model=MODEL, input=["w9", "w10"])
plain = client.embeddings.create(model=MODEL, input=["w9", "w10"], encoding_format="float")
numbers = lambda said: [array.array("f", one.embedding) for one in said.data]
assert numbers(packed) == numbers(plain)
assert len(packed.data) == 2 and len(packed.data[0].embedding) == 64
assert packed.usage.prompt_tokens == 6
try:
    client.embeddings.create(model=MODEL, input="w9", dimensions=3)
    raise AssertionError("vectors have a length of their own")
except openai.BadRequestError as error:
    assert error.param == "dimensions"
print("all passed")
