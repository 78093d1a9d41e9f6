"""Pooling-based Vision Transformers (PiT) for probekit."""
