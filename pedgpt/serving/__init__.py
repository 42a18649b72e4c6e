"""Serving: many conversations at once with one base in memory, behind an OpenAI-compatible API (extra `serve`)."""

from pedgpt.serving.scheduler import Scheduler
from pedgpt.serving.server import Served, Server, is_local

__all__ = ["Scheduler", "Served", "Server", "is_local"]
