"""Starting runs: one YAML for every platform. Imports neither torch nor pyro."""
