"""The paper's metrics; each is registered in `probekit.builtins`."""
