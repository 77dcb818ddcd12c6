"""The address of a chat server and the key for it, as a command names them.

Called by the server engine.
"""

import os
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from toolkit.recipe.errors import RecipeError

KEY_VARIABLE = "OPENAI_API_KEY"


def checked_address(url: str) -> str:
    """The address in the form that the client wants; RecipeError if it is none."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:
        whole, parts = False, urlsplit("")
    if parts.username or parts.password or "@" in parts.netloc:
        raise RecipeError("--server: the address holds a password; name the variable with the key by --key-variable")
    if not whole:
        raise RecipeError(f"--server {url}: is no address of a server; write it as http://host:8000/v1")
    if parts.query or parts.fragment:
        shown = url.partition("?")[0].partition("#")[0]  # what stands behind it may be a key
        raise RecipeError(f"--server {shown}: has a part behind ? or #; leave it out")
    return url.rstrip("/").removesuffix("/chat/completions")


def key_of(variable: str | None) -> str:
    """The key in an environment variable (None: KEY_VARIABLE, which may be absent: ""); RecipeError if it is none."""
    key = os.environ.get(variable or KEY_VARIABLE, "").strip()
    if variable is not None and not key:
        raise RecipeError(f"--key-variable {variable}: there is no such environment variable; put the key into it")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise RecipeError(f"the environment variable {variable or KEY_VARIABLE} holds what cannot be a key; mend it")
    return key


def is_local(url: str) -> bool:
    """Whether requests stay on this machine."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def unused_proxy(url: str) -> str:
    """What is to be said where the environment names a proxy for an address; else ""."""
    parts = urlsplit(url)
    proxies = getproxies()
    if (parts.scheme in proxies or "all" in proxies) and not is_local(url) and not proxy_bypass(parts.hostname or ""):
        return f"the proxy of the environment ({parts.scheme}_proxy) is not used; requests go straight to the host"
    return ""
