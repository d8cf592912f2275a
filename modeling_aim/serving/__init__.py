"""Served to others: an OpenAI-compatible server on transformers' own (`aim serve`), and exports for vLLM."""
