"""Marks in others' training loops, and the guard in another server."""
