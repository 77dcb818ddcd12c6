"""The methods: one folder each, and this table of them. Nothing outside these folders knows one by name."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolkit.methods.keys import MethodKeys
    from toolkit.methods.method import Method

# The name that a recipe writes into objective.name -> the package with keys.py and method.py.
TABLE = {
    "language_model": "toolkit.methods.language_model",
    "revela": "toolkit.methods.revela",
    "contrastive": "toolkit.methods.contrastive",
    "recontriever": "toolkit.methods.recontriever",
    "sycl": "toolkit.methods.sycl",
    "cde": "toolkit.methods.cde",
}


def keys_of(name: str) -> "MethodKeys":
    """What a recipe says of a method, and how that is checked; imports no torch."""
    return import_module(f"{TABLE[name]}.keys").KEYS


def method_of(name: str) -> "Method":
    """A method's functions; imported only here, since with them comes torch."""
    return import_module(f"{TABLE[name]}.method").METHOD
