"""Pre-training and fine-tuning of Vision Transformers for probekit."""
