"""The conversation store as a Python API: `Store`, and pure helpers for messages.

Owned here: `store` (reads through the models of `anynode.models.tables`, writes through the statements that nodes use,
and turns that run in the application's own process) and `messages`. Imports the engine, and nothing of the APIs.
"""
