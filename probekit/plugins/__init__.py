"""Plugins: loading them one by one, containing what is broken, finding what they offer by name."""
