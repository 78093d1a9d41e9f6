"""``python -m probekit``."""

from probekit.cli.app import run_main

run_main()
