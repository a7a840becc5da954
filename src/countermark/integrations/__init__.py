"""Marks in the training loops of other libraries, and the guard in another server."""
