"""Ask with the OpenAI SDK, and continue after a lost connection where it broke, on any node.

pip install openai
ANYNODE_TOKEN=… python responses.py "Why is the sky blue?"
"""

from __future__ import annotations

import os
import sys
import time
import uuid

import openai

URL = os.environ.get("ANYNODE_URL", "http://127.0.0.1:8000")
ENDINGS = ("response.completed", "response.incomplete", "response.failed")
TRIES_MAX = 20


def ask(client: openai.OpenAI, question: str) -> None:
    """Print the answer to a question, in a new conversation."""
    # The same key is the same question, however often it is sent.
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    response_id, last = "", -1
    for tries in range(TRIES_MAX):
        try:
            if response_id:
                events = client.responses.retrieve(response_id, stream=True, starting_after=last)
            else:
                events = client.responses.create(input=question, background=True, stream=True, extra_headers=headers)
            for event in events:
                last = event.sequence_number
                if event.type == "response.created":
                    response_id = event.response.id
                elif event.type == "response.output_text.delta":
                    print(event.delta, end="", flush=True)
                elif event.type in ENDINGS:
                    print()
                    return
        except (openai.APIConnectionError, openai.InternalServerError):
            pass  # the connection broke, or no node was there
        time.sleep(min(0.1 * 2**tries, 5))
    raise SystemExit(f"no node can be reached at {URL}")


if __name__ == "__main__":
    ask(openai.OpenAI(base_url=f"{URL}/v1", api_key=os.environ["ANYNODE_TOKEN"]), sys.argv[1])
