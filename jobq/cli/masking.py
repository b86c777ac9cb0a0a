"""Secrets taken out of what is shown.

Invariant: the password of a URL, and what its query calls a secret, are never shown.
Called by all of cli. Calls nothing.
"""

from __future__ import annotations

import re

# Up to the last @ before a path, else up to the first one: an unescaped password may hold either sign.
_PASSWORD = re.compile(r"(?<=://)([^:@/?#\s]*):(?:[^/?#\s]*|[^@\s]*)@")
_SECRET = re.compile(r"(?i)([?&][^=&#\s]*(?:pass|pwd|secret|token|credential)[^=&#\s]*=)[^&#\s'\"]+")


def mask(text: str) -> str:
    """Replace the secrets of the URLs in `text` by ***."""
    return _SECRET.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text))
