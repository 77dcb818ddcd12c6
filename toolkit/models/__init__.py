"""Backbones, pooling and adapters: plain modules that know no method and no rank."""
