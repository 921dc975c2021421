"""What a loss is, free of Lightning: a model and a batch to named terms."""
