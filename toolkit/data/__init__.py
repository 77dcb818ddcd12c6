"""Files on disk -> records -> stores -> streams of batches; knows no method and no model."""
