"""Masked autoencoders for probekit."""
