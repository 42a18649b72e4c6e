"""Builders: each makes rows for the corpus, from a knowledge graph, a text, a conversation or a template."""
