"""BEiT and BEiT v2 Vision Transformers for probekit."""
