"""Asks a worker whether it makes progress: `python -m distopt.launch.worker.health_probe HOST PORT`, for health checks.

A worker that says it is stalled, or takes the connection and says nothing, is to be replaced. One that is not there is
not: its engine is starting it again, or waits for a pod whose node is still fetching the image. To a kubelet that asks
over HTTP the two are the same, and one lost node would have all other pods killed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException

TIMEOUT_S = 4.0


def main(argv: Sequence[str]) -> int:
    """Returns 1 when the worker answers that it is stalled, or does not answer."""
    host, port = argv
    worker = HTTPConnection(host, int(port), timeout=TIMEOUT_S)
    try:
        worker.connect()
    except OSError:
        print("no worker listens at the moment")
        return 0
    try:
        worker.request("GET", "/livez")
        answer = worker.getresponse()
        print(answer.read().decode("utf-8", "replace").strip())
        return int(answer.status != 200)
    except (OSError, HTTPException) as error:
        print(f"no answer from the worker: {error!r}")
        return 1
    finally:
        worker.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
