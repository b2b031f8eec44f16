"""The API reference, made from the types that decode and encode: /openapi.json, /asyncapi.json and /docs."""
