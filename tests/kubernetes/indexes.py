"""Stands in for what Kubernetes does for Indexed Jobs since 1.21.

The pods of a Job get the lowest completion index that no living pod has, as a label, and the name that the headless
Service publishes, `JOB-INDEX.JOB.NAMESPACE.svc.cluster.local`. The real Job controller starts and replaces pods.
"""

from __future__ import annotations

import json
import subprocess
from threading import Lock, Thread, Timer
from typing import Any

from tests.kubernetes.cluster import Cluster

LABEL = "batch.kubernetes.io/job-completion-index"
# A pod's name follows its address at some distance, through the controller of endpoints and a name server that knows
# for a while that there was none. torchrun, started at once, fails.
LATE_S = 10.0


class Indexes:
    """Numbers and names the pods of all Jobs in a namespace from entering to leaving."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self._lock = Lock()
        self._indexes: dict[str, tuple[str, int]] = {}
        self._names: dict[str, str] = {}
        self._timers: list[Timer] = []

    def __enter__(self) -> Indexes:
        watch = ["get", "pods", f"--namespace={self.namespace}", "--selector=job-name", "--watch"]
        watch += ["--output=json", "--output-watch-events"]
        kubectl = ["kubectl", f"--kubeconfig={self.cluster.kubeconfig}", *watch]
        self._watch = subprocess.Popen(self.cluster.inside(0, *kubectl), stdout=subprocess.PIPE, text=True)
        self._thread = Thread(target=self._follow, name="indexes")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.terminate()
        self._watch.wait(30)
        self._thread.join(30)
        for timer in self._timers:
            timer.cancel()
            timer.join(30)

    def _follow(self) -> None:
        assert self._watch.stdout is not None
        text = ""
        for line in self._watch.stdout:
            text += line
            if line == "}\n" or line.startswith('{"'):  # older clients indent an event, newer ones give it a line
                event = json.loads(text)
                text = ""
                self._note(event["type"], event["object"])
        self._watch.stdout.close()

    def _note(self, kind: str, pod: dict[str, Any]) -> None:
        name, job = pod["metadata"]["name"], pod["metadata"]["labels"]["job-name"]
        if kind == "DELETED" or pod["status"]["phase"] in ("Succeeded", "Failed"):
            self._indexes.pop(name, None)
            if self._names.pop(name, None):
                self._publish()
            return
        if name not in self._indexes:
            taken = {index for owner, index in self._indexes.values() if owner == job}
            self._indexes[name] = (job, min(set(range(len(taken) + 1)) - taken))
            label = ["label", "pod", name, f"--namespace={self.namespace}", f"{LABEL}={self._indexes[name][1]}"]
            self.cluster.kubectl(*label, check=False)  # it may be gone by now
        address = pod["status"].get("podIP")
        if address and name not in self._names:
            # An Indexed Job's pod has the name with the index as its host name, by which torchrun tells where it is.
            hosts = (f"{job}-{self._indexes[name][1]}", name)
            service = f"{job}.{self.namespace}.svc.cluster.local"
            self._names[name] = f"{address} {' '.join(f'{host}.{service}' for host in hosts)}\n"
            self._timers.append(Timer(LATE_S, self._publish))
            self._timers[-1].start()

    def _publish(self) -> None:
        with self._lock:
            self.cluster.reload_names("".join(list(self._names.values())))
