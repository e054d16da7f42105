"""The training loop: objective, credit, metrics, evaluation, optimisers, checkpoints."""
