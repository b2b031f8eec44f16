"""How many examples hypothesis tries: profiles for the whole suite, and tests that want another number."""

from __future__ import annotations

from typing import Final

from hypothesis import HealthCheck, settings

FULL: Final = "full"
QUICK: Final = "quick"  # pytest --hypothesis-profile=quick
EXAMPLES: Final = {FULL: 100, QUICK: 20}


def register_profiles() -> None:
    """Register the profiles, and load the full one.

    No example has a deadline, and none is too slow to generate: a busy machine makes a test slow, not wrong, and
    hypothesis itself is slow when it first builds its tables of characters.
    """
    suppressed = [HealthCheck.too_slow]
    for name, count in EXAMPLES.items():
        settings.register_profile(name, max_examples=count, deadline=None, suppress_health_check=suppressed)
    settings.load_profile(FULL)


def examples(count: int) -> settings:
    """Return the settings of a test with this number of examples in the full profile, and fewer in the quick one."""
    return settings(max_examples=count * settings().max_examples // EXAMPLES[FULL])
