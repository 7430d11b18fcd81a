"""Where checkpoints lie: a folder of this machine, or an object store."""
