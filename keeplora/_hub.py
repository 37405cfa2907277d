"""Models of the Hub: whether one can be had is asked once, before other libraries ask again and again."""

from __future__ import annotations

import os

__all__ = ["hub_fault"]

SECONDS = 5.0
"""To wait for the Hub's answer."""


def hub_fault(name: str, *files: str) -> str | None:
    """Why none of ``files`` of the model ``name`` is to be had; None if one is in a folder, in the cache or on the Hub.

    Without a network this takes no time, where a download would try for half a minute.
    """
    if os.path.isdir(name):
        return None
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    fault = None
    for file in files or ("config.json",):
        try:
            if not isinstance(try_to_load_from_cache(name, file), str):
                get_hf_file_metadata(hf_hub_url(name, file), timeout=SECONDS)
            return None
        except Exception as error:  # the Hub's, or those of whatever it is reached with; each is told
            said = " ".join(str(error).split()) or "no reason given"
            fault = f"it is not on this disk, and the Hub gave none ({type(error).__name__}: {said[:200]})"
    return fault
