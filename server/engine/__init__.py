"""The turns of one node: admission, the journal, leases, takeover, and cursors over what is committed.

Imports nothing of `transport` or `api`. This is the concurrency contract of the package.

Pattern. Decisions are plain state that is given the time: `journal.FlushSchedule` and `TurnBuffer`, `cursor.Channel`,
`Log` and `Cursor`, `leases.LeaseClock` and `renewal_of`, `turn.Draft` and `Patience`, `steps`, `users.EmailNotes`.
Tasks around them do the I/O: `Journal`, `Follows`, `Leases`, `TurnRunner`, `Emails`, `Node`.

Concurrency. Everything runs on one event loop, and nothing here is safe to call from another thread. State changes only
between awaits, so no locks are needed. One task flushes; there is never more than one flush under way. One task renews
leases, one drops the lapsed ones, one takes over, one reads the turns of other nodes, and one listens to the cluster.
Each turn has a task for its agent and one that waits for the turn's end. Followers run in the tasks of their callers.
An agent waits for the database only after tool calls, and never for a client.

Lifecycle. `Node.run` owns the tasks that live as long as the node, and ends them together. `RunningTurns` owns the
tasks of turns: a turn begins with `start`, at its admission or takeover, and is forgotten once its end is committed or
it is lost. `Node.drain` admits nothing more, waits, and hands over what is left. A channel lives while it has followers
or a running turn; a log lives until its last follower has shown it.

Invariants.

- Only the owner of a turn appends to its conversation. Every write carries the turn's epoch, and Postgres refuses a
  stale one. A node gives a turn up when its own clock no longer trusts the lease.
- Nothing is published before its commit is known, and what is published is in the order of `seq`, without a gap.
- A flush whose outcome is unknown is repeated with the same keys until it is answered or the lease runs out.
- A turn ends once. The first of end, error, cancel, silence and loss counts.
- A wake-up is a hint. A follower that missed one finds everything in Postgres, and `changes` tells it when to look.
- Everything is bounded: an answer by its size limit, a reading by its rows, a takeover by its turns, and a follower by
  its cursor, which queues nothing.
"""
