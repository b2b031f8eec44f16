"""The AI SDK's own packages as clients: their drivers, and what stands between them and the nodes."""
