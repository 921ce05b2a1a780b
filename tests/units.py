"""The one unit of time."""

from __future__ import annotations

import os

SECOND = float(os.environ.get("TEST_SECOND", "1"))
"""Every wait of a test is a multiple of this; on a slow machine set TEST_SECOND=5."""
