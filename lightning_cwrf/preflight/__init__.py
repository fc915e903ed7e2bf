"""The preflight: what would go wrong in a hardening or an audit, found in a minute and before it."""

from lightning_cwrf.preflight.findings import Finding, Preflight
from lightning_cwrf.preflight.run import check

__all__ = ["Finding", "Preflight", "check"]
