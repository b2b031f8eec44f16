"""What the product costs, beside a floor that does the least that is necessary."""
