"""Which rows this worker reads next."""
