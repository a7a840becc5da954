"""The guarded service: the Open Inference Protocol v2 over HTTP, with a durable query log.

A trial is in the log before its answer leaves.
"""
