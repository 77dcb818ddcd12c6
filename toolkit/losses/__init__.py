"""Losses as pure functions of tensors, in fp32 inside; they know no model and no rank."""
