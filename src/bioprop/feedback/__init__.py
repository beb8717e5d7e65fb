"""Training of feedback weights: losses and their gradients, closed forms, noise, steps, and the loop over a batch."""
