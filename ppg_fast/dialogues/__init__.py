"""Dialogues from files to packed tokens: formats on disk, chat templates, prompts, packing."""
