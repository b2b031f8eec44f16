"""How many descriptors the process may have open: as many as its connections need, if the system lets it."""

from __future__ import annotations

import logging
from typing import Final

try:
    import resource
except ImportError:  # there is no such limit on this platform
    resource = None  # type: ignore[assignment]

logger = logging.getLogger("anynode")

RESERVED: Final = 100  # descriptors that are neither connections of clients nor of Postgres


def allow_open_files(connections: int, others: int) -> int:
    """Raise the soft limit of open files (`ulimit -n`) towards what a node needs; return how many connections fit.

    `connections` are those of clients that the settings let in; `others` are further descriptors that the node needs.
    Where the hard limit is too low, say in one line what to do.
    """
    others += RESERVED
    allowed = _raise_limit(connections + others)
    if allowed is None or allowed >= connections + others:
        return connections
    fitting = max(allowed - others, allowed // 2)
    logger.warning(
        "this process may open %d files, so it takes %d connections and not %d: raise the limit of open files "
        "(ulimit -n, LimitNOFILE) to %d, or lower CONNECTIONS_MAX",
        allowed,
        fitting,
        connections,
        connections + others,
    )
    return fitting


def _raise_limit(needed: int) -> int | None:
    """Raise the soft limit to `needed`, or as far as the system lets; return it, None where there is none."""
    if resource is None:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return None if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError):  # the kernel has a limit of its own, as macOS does
        return soft
    return wanted
