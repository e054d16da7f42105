"""Dialogues made by the policy: environments, partners, generation, groups of rollouts."""
