"""The OpenAI Responses API, for clients that speak it already."""
