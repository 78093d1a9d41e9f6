"""The watcher: any Vision Transformer, observed without touching it."""

from __future__ import annotations

from probekit.watch.watcher import Visitor, Watcher

__all__ = ["Visitor", "Watcher"]
