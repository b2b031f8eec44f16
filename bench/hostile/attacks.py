"""The attacks by name: what each sends, with which settings, and what it may cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from bench.hostile import anonymous, memory, model, ordinary
from bench.hostile.figures import GROWTH, Bound, Row, bounds_of
from bench.hostile.peer import AttackRun, Target

SCALED: Final = {"CONNECTIONS_MAX": "200", "UNAUTHENTICATED_MAX": "50", "UNAUTHENTICATED_PER_ADDRESS_MAX": "50"}
MODEL: Final = {"AGENT": "openai", "OPENAI_API_KEY": "sk-hostile", "MODEL": "fake-1"}  # and the port of the hostile one


@dataclass(frozen=True)
class Attack:
    """One attack. There are `nodes` nodes, and the first one is attacked. Quick runs leave out what `is_slow`."""

    run: Callable[[Target], AttackRun]
    bounds: Sequence[Bound] = bounds_of()
    environment: Mapping[str, str] = field(default_factory=dict)
    nodes: int = 1
    is_slow: bool = False

    @property
    def what(self) -> str:
        """Say in one sentence what is sent."""
        return " ".join((self.run.__doc__ or "").split())


def _attack(
    run: Callable[[Target], AttackRun],
    *own: Bound,
    environment: Mapping[str, str] = MappingProxyType({}),
    nodes: int = 1,
    is_slow: bool = False,
) -> Attack:
    return Attack(run, bounds_of(*own), environment, nodes, is_slow)


_ALL: Final[Sequence[Attack]] = (
    # Without a token.
    _attack(anonymous.pings, Bound(GROWTH, 64)),
    _attack(anonymous.pongs, Bound("turns that lost their lease", 0), nodes=2),
    _attack(anonymous.empty_frames, Bound(GROWTH, 64)),
    _attack(anonymous.limbo, Bound("neither answered nor closed after 10 s", 0), Bound(GROWTH, 64)),
    _attack(anonymous.trailers, Bound(GROWTH, 32), is_slow=True),
    _attack(anonymous.trailers_stream, Bound(GROWTH, 32)),
    _attack(anonymous.unfinished_frames, Bound(GROWTH, 64)),
    _attack(anonymous.unauthenticated, environment=SCALED),
    _attack(anonymous.idle_tcp, Bound(GROWTH, 64), is_slow=True),
    _attack(anonymous.slow_heads, Bound("seconds until the last is cut", 12), is_slow=True),
    _attack(anonymous.long_tokens, Bound("handshakes and requests of 12 that fail", 0)),
    _attack(anonymous.cookies, Bound("without an answer", 0), is_slow=True),
    _attack(anonymous.invalid_utf8),
    _attack(anonymous.long_assets, Bound("answers 500", 0)),
    _attack(anonymous.malformed_http),
    # With the token of one user.
    _attack(ordinary.large_json),
    _attack(ordinary.searches),
    _attack(ordinary.far_pages, is_slow=True),
    _attack(ordinary.follows, Bound("new Postgres backends/s", 1)),
    _attack(ordinary.interrupts, Bound("transactions/s", 500)),
    _attack(ordinary.bodies),
    _attack(ordinary.held_bodies, Bound(GROWTH, 256)),
    _attack(ordinary.streams, environment=SCALED),
    _attack(ordinary.turns, Bound("turns that run", 20), is_slow=True),
    _attack(ordinary.turns_max, Bound("turns that run", 20), environment={"TURNS_MAX": "50"}),
    _attack(
        ordinary.storage,
        Bound("MB stored", 9),
        environment={"CONVERSATIONS_PER_USER_MAX": "1000", "MESSAGES_PER_USER_BYTES_MAX": "8000000"},
    ),
    # Memory.
    _attack(memory.large_snapshot),
    _attack(memory.journal_again, is_slow=True),
    _attack(memory.readers, Bound("kept, MB", 64)),
    _attack(memory.followers, Bound("KiB of an idle follower", 40), environment={"CONNECTIONS_PER_USER_MAX": "0"}),
    _attack(
        memory.churn,
        Bound("not served", 0),
        Bound("growth of RSS over the last four fifths, MB", 16),
        Bound("growth of open files", 3),
        is_slow=True,
    ),
    # A hostile model.
    _attack(model.endless_model, Bound("turns without an end", 0), environment={**MODEL, "TURN_SECONDS_MAX": "3"}),
    _attack(model.gzip_bomb, Bound("answers that were taken", 0), environment=MODEL),
    _attack(
        model.odd_usage, Bound("odd values that were passed on", 0), Bound("turns without an end", 0), environment=MODEL
    ),
)
ATTACKS: Final[Mapping[str, Attack]] = {attack.run.__name__: attack for attack in _ALL}
ROWS: Final = tuple(Row(name, attack.what, attack.bounds) for name, attack in ATTACKS.items())
