"""Held-out evaluation: likelihood, generated answers, and the report of a whole run."""
