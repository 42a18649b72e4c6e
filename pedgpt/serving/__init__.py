"""Serving: many conversations at once with one base in memory, behind an OpenAI-compatible API (extra `serve`)."""
