"""Starting runs: one YAML for every platform. Imports neither torch nor pyro.

    config ── checks ──► plan ──┬─ attach ──► launcher (torchrun, horovodrun, …) ──┬──► supervisor ──► worker
                                │                ▲                                 │        │
                                │                └──────────── run_dir/logs ◄──────┼────────┘
                                └─ job ─────► cluster (Slurm, Kubernetes) ─────────┘

A platform renders a `Plan`. `attach` starts its commands and stays with them; or the plan is submitted to a cluster,
and `runs` asks the `Job` there. Between a launcher and each worker stands a supervisor: it keeps the worker's log,
passes signals on, and records when and how the worker ended, so that on every platform the same report tells which rank
died first.
"""
