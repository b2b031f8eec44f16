"""Agents, which produce the answers: the interface (`agent`), the built-in ones, tools, and adapters.

It may import `protocol`, `settings` and what lies below them, and knows nothing of turns, sockets or the database.
"""
