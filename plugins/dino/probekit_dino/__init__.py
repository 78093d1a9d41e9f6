"""DINO and DINOv2 Vision Transformers for probekit."""
