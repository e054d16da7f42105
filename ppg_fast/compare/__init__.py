"""Policy classes side by side."""
