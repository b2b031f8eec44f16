"""The turns of one node: admission, the journal, leases, takeover, and cursors over what is committed."""
