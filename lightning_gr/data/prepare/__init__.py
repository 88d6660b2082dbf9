"""From a log in files to an event store: read in pieces, spilled by user, filtered, coded and written part by part."""

from lightning_gr.data.prepare.run import prepare
from lightning_gr.data.prepare.settings import PrepareSettings

__all__ = ["PrepareSettings", "prepare"]
