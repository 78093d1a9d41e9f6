"""MoCo v3 Vision Transformers for probekit."""
