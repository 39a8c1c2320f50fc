"""The versions that a handshake compares."""

from __future__ import annotations

from importlib import metadata

try:
    VERSION = metadata.version("patchwire")
except metadata.PackageNotFoundError:  # run from a checkout that was not installed
    VERSION = "0+unknown"

PROTOCOL_VERSION = 1
"""Counts changes of the protocol that older servers would misread; additions do not count."""
