"""The Python client that reconnects and resumes, and the terminal chat on top of it.

It may import `protocol` and `errors`: what a client in another language has to write for itself.
"""
