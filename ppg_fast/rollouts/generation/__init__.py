"""Where a policy's answers come from: the model itself, many dialogues at once, or a server that speaks the OpenAI
protocol."""

from ppg_fast.rollouts.generation.answers import Answer, Request, Sampler
from ppg_fast.rollouts.generation.local import LocalSampler
from ppg_fast.rollouts.generation.remote import EndpointSampler

__all__ = ["Answer", "EndpointSampler", "LocalSampler", "Request", "Sampler"]
