"""What a run goes on from: weights and optimizer states in pieces, and the digests that they belong to."""
