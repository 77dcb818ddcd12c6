"""Artefacts of a stage made once and kept: texts and pairs as tokens, models, neighbours, hard negatives."""
