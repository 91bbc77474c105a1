"""The ways from text to latents other than denoising: one package a family, launched like stage 3."""
