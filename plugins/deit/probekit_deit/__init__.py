"""Supervised Vision Transformers for probekit: DeiT, distilled DeiT, DeiT III and AugReg."""
