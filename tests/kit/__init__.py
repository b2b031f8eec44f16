"""The harness: what starts, watches, cuts and kills for the tests, and the clients that they speak with."""
