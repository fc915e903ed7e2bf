"""The command ``cwrf``: check, harden, audit and report, over import paths or a YAML file."""

from lightning_cwrf.commands.cli import main

__all__ = ["main"]
