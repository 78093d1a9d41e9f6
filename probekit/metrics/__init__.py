"""The paper's metrics; each is registered in `probekit.plugins.builtins`."""
