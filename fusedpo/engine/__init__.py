"""From hidden states and the head to statistics of the scored tokens, and back to gradients."""
