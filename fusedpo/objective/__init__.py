"""From log-probabilities to the loss: batch, reference, arguments, formula, groups, output."""
