"""Starting runs: one YAML for every platform. Imports neither torch nor pyro.

    config ── checks ──► plan ── follow ──► engine (torchrun, horovodrun, …) ──► guard ──► worker
                                   ▲                                               │
                                   └──────────── run_dir/logs ◄────────────────────┘

A platform renders a `Plan`; `follow` starts its commands and watches. Between the engine and each worker stands a
`guard`: it keeps the worker's log, passes signals on, and writes down when and of what the worker ended, so that
the same report says on every platform which rank died first.
"""
