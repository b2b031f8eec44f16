"""Typed frames and bodies, their strict decoding, and their encoding. No I/O."""
