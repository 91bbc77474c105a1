"""Trains the family `normalizing_flow`: noise to latents by invertible blocks."""
