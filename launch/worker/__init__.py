"""What runs beside a worker: with every rank, so these modules import the standard library and `distopt.launchers`."""
