"""The OpenAI Responses API, as one more face of the journal."""
