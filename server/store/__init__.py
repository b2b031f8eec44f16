"""The conversation store as a Python API: `Store`, and pure helpers for messages.

Owned here: `store` (reads through the models of `anynode.models.tables`, writes through the statements that nodes use,
and turns that run in the application's own process) and `messages`. On the same rows stand `export` and `forget`, the
commands for all that is stored of one user. Imports the engine, and nothing of the APIs.
"""
