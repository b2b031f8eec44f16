"""Agents: what produces the answers."""
