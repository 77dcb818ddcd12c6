"""Everything about processes: how they start and find each other, whether they live and agree, how they end."""
