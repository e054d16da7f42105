"""Adapters to other trainers: each imports its host when it is itself imported, and translates shapes, masks,
denominators and options."""
