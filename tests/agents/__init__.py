"""Agents and tools that tests name in AGENT and TOOLS."""
