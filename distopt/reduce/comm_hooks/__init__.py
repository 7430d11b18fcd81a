"""Communication hooks: how the gradients of one bucket cross the network."""
