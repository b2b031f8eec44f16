"""The command `anynode dev`: embedded Postgres, several nodes, a load balancer. Serving imports nothing of it."""
