"""What schemathesis must know of our API beyond its document; its command line imports this (`SCHEMATHESIS_HOOKS`)."""

from __future__ import annotations

import schemathesis
from hypothesis import strategies as st

# Ids are printable, which no pattern says in all dialects of regular expressions.
PRINTABLE = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=128)
schemathesis.openapi.format("printable", PRINTABLE)
