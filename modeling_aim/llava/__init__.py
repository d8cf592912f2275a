"""LLaVA (arXiv 2304.08485) beyond its data format: instruction data by a text model, and a judge of answers."""
