"""What all techniques share: the attachment, batches, normalisation, gradients, references, checkpoints, rules."""
