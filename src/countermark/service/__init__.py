"""The guarded service: the Open Inference Protocol v2 over HTTP, and a query log that is durable before an answer leaves."""
