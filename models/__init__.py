"""Anynode's database: tables, rules, statements and migrations. Imports nothing of ``server``."""
