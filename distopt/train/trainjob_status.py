"""The progress of a run in the status of its TrainJob, as `kubectl get trainjob` and Kubeflow's client show it.

With its feature gate `TrainJobStatus` (Kubeflow trainer 2.2 and later) the operator gives each pod a URL, the
certificate of the server there and a token for it. Updates are best effort: a server that does not answer ends no
training.
"""

from __future__ import annotations

import json
import math
import os
import ssl
import sys
import threading
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

from distopt.train.loggers import Logger, RunInfo

URL_VARIABLE = "KUBEFLOW_TRAINER_SERVER_URL"
CERTIFICATE_VARIABLE = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
TOKEN_VARIABLE = "KUBEFLOW_TRAINER_SERVER_TOKEN"  # a file, which the kubelet writes anew before the token expires

PERIOD_S = 5.0  # what Kubeflow asks its clients to keep to
TIMEOUT_S = 5.0


class TrainJobLogger(Logger):
    """Sends step, time left and what was measured last, from a thread, at most every five seconds.

    Args:
        url: Where updates are sent.
        certificate: The file of the certificate that the server is checked against.
        token: The file of the token.
        period_s: The least number of seconds between updates.
    """

    def __init__(self, url: str, certificate: Path, token: Path, period_s: float = PERIOD_S) -> None:
        self._url = url
        self._certificate = certificate
        self._token = token
        self._period_s = period_s
        self._values: Mapping[str, float] = {}
        self._is_changed = True
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._send_until_closed, name="trainjob-status", daemon=True)
        self._has_failed = False

    def start(self, run: RunInfo) -> None:
        """Starts the thread."""
        self._run = run
        self._step = run.first_step
        self._started_s = monotonic()
        self._thread.start()

    def after_step(self, step: int) -> None:
        """Notes the step."""
        self._step = step
        self._is_changed = True

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Notes what was measured."""
        self._values = dict(values)
        self._is_changed = True

    def close(self) -> None:
        """Sends where the run ended, and waits at most for that."""
        self._closed.set()
        self._thread.join(2 * TIMEOUT_S)

    def _send_until_closed(self) -> None:
        is_closed = False
        while not is_closed:
            # Reset first, so that what changes while this is sent is sent the next time.
            if self._is_changed:
                self._is_changed = False
                self._send()
            is_closed = self._closed.wait(self._period_s)
        if self._is_changed:
            self._send()

    def _send(self) -> None:
        try:
            request = urllib.request.Request(
                self._url,
                data=json.dumps({"trainerStatus": self._status()}).encode(),
                headers={
                    "Authorization": f"Bearer {self._token.read_text().strip()}",
                    "Content-Type": "application/json",
                },
                method="POST",
            )
            context = ssl.create_default_context(cafile=str(self._certificate))
            urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context).close()
        except (OSError, ValueError) as error:  # of the file, the network, TLS, HTTP or the URL
            if not self._has_failed:
                what = f"the status of the TrainJob cannot be updated at {self._url}: {error}"
                print(f"distopt: {what}; training continues", file=sys.stderr, flush=True)
            self._has_failed = True
        else:
            self._has_failed = False

    def _status(self) -> dict[str, Any]:
        """Returns what Kubeflow calls `TrainerStatus`; values are strings there."""
        steps = self._step - self._run.first_step
        left = self._run.num_steps - self._step
        status = {
            "progressPercentage": min(100, 100 * self._step // max(1, self._run.num_steps)),
            "metrics": [
                {"name": name, "value": f"{value:.8g}"} for name, value in self._values.items() if math.isfinite(value)
            ],
            "lastUpdatedTime": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        }
        if steps > 0:
            status["estimatedRemainingSeconds"] = max(0, round(left * (monotonic() - self._started_s) / steps))
        return status


def trainjob_logger(environ: Mapping[str, str] | None = None) -> TrainJobLogger | None:
    """Returns the logger of a pod whose operator takes updates, or None.

    Args:
        environ: Variables to read; those of this process when None.
    """
    environ = os.environ if environ is None else environ
    url, certificate, token = (environ.get(name) for name in (URL_VARIABLE, CERTIFICATE_VARIABLE, TOKEN_VARIABLE))
    if not url or not certificate or not token:
        return None
    return TrainJobLogger(url, Path(certificate), Path(token))
