"""Measurements of the product, beside a floor that does only the necessary work."""
