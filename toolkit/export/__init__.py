"""A trained retriever as a folder that others load: written, checked in a fresh process, and described."""
