"""The schema's history, one module a change, applied in order by ``anynode.models.migrate``."""
