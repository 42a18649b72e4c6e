"""Serving: many conversations at once with one base in memory, behind an OpenAI-compatible API (extra `serve`)."""

from pedgpt.serving.api import Served
from pedgpt.serving.scheduler import Scheduler
from pedgpt.serving.server import Limits, Server, is_local

__all__ = ["Limits", "Scheduler", "Served", "Server", "is_local"]
