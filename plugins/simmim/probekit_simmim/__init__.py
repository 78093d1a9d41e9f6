"""SimMIM's Vision Transformer for probekit."""
