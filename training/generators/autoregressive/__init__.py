"""Trains the family `autoregressive`: the codes of a vq autoencoder, one after the other."""
