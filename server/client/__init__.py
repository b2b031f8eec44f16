"""The Python client that reconnects and resumes, and the terminal chat on top of it."""
