"""The Hub, read: repos pinned to commits, listings, small files, large files by ranges.

Everything that speaks to the Hub's client in order to read is here, and no error of that client
leaves this room: each becomes one that names repo, revision, file, status and what to do.
"""

from __future__ import annotations

from merge.hub.client import SCHEME, Entry, Hub, Pinned, current, is_hub_id, use
from merge.hub.ranges import RemoteFile

__all__ = ["SCHEME", "Entry", "Hub", "Pinned", "RemoteFile", "current", "is_hub_id", "use"]
