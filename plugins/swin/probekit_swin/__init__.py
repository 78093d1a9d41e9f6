"""Swin and Swin V2 Transformers for probekit."""
