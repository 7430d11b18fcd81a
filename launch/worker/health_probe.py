"""Whether a worker makes progress: `python -m distopt.launch.worker.health_probe HOST PORT`, for health checks.

A worker that reports that it is stalled, or accepts the connection and does not answer, is to be replaced. A worker
that is not there is not: torchrun is starting it again, or waits for a pod whose node is still fetching the image. A
kubelet that asks over HTTP cannot tell the two apart, and one lost node would have all other pods killed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException

TIMEOUT_S = 4.0  # below the probe's own timeout in the manifest, so that the reason is printed


def main(argv: Sequence[str]) -> int:
    """Returns 1 when the worker answers that it is stalled, or does not answer."""
    host, port = argv
    worker = HTTPConnection(host, int(port), timeout=TIMEOUT_S)
    try:
        worker.connect()
    except OSError:
        print("no worker is listening at the moment")
        return 0

    try:
        worker.request("GET", "/livez")
        answer = worker.getresponse()
        print(answer.read().decode("utf-8", "replace").strip())
        return int(answer.status != 200)
    except (OSError, HTTPException) as error:
        print(f"the worker does not answer: {error!r}")
        return 1
    finally:
        worker.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
