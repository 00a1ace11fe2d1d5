"""From image bytes to pixels, and from checkpoint files to a Vision Transformer."""
