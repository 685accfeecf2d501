"""Whether the Hugging Face hub can be reached."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from functools import cache

from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE


@cache
def hub_answers() -> bool:
    """Whether the hub answers. Without a network its own client would try for a minute and warn 18 times."""
    if HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(ENDPOINT, timeout=20).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException):  # ValueError: HF_ENDPOINT is no address
        return False
    return True
