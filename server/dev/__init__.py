"""The command `anynode dev`: embedded Postgres, several nodes, a load balancer, and the orders of the page.

It stands above `serve`, as its nodes are run through that. Serving imports nothing of it.
"""
