"""Where checkpoints are stored: a folder of this machine, an object store, or a storage of your own."""
