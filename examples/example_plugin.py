"""The same metric as an installed package: what its entry point names."""

from probekit import MetricSpec, hookimpl

PROBEKIT_API = 1


@hookimpl
def probekit_metrics():
    return [MetricSpec(name="entropy", summary="how spread a head's attention is", target="entropy:Entropy")]
