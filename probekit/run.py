"""Moved to probekit.execution (the name `probekit.run` is the public function); this shim goes away."""

from probekit.execution import *  # noqa
from probekit.execution import execute, forecast, make_metric, run_cell  # noqa
