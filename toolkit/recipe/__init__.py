"""What a user writes: the sections of a recipe, its checks and its errors. No torch: mistakes are told at once."""
