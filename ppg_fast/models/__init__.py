"""The causal LM that is trained: its head without logits, packed attention, adapters, export."""
