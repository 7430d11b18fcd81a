"""kmock's Kubernetes API server, which speaks the real protocol; no controller and no kubelet stand behind it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any


class Server:
    """kmock's API server in a thread, with the resources that runs are made of."""

    RESOURCES = [
        "v1/services", "v1/pods", "v1/configmaps", "networking.k8s.io/v1/networkpolicies",
        "policy/v1/poddisruptionbudgets",
        "batch/v1/jobs", "jobset.x-k8s.io/v1alpha2/jobsets", "kubeflow.org/v1/pytorchjobs",
        "kubeflow.org/v2beta1/mpijobs", "trainer.kubeflow.org/v1alpha1/trainjobs",
    ]  # fmt: skip

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.url = ""
        self.emulator: Any = None
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="api-server")

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._serve())
        self.loop.close()

    async def _serve(self) -> None:
        import kmock

        self._down = asyncio.Event()
        async with kmock.KubernetesEmulator() as emulator:
            self.emulator = emulator
            for resource in self.RESOURCES:
                emulator.resources[resource] = kmock.ResourceInfo(namespaced=True)
            # What a kubelet answers for a container whose image is still being pulled, seen with release 1.20.
            waiting = 'container "worker" in pod "waiting" is waiting to start: ContainerCreating'
            status = {"kind": "Status", "status": "Failure", "message": waiting, "reason": "BadRequest", "code": 400}
            emulator["get /api/v1/namespaces/default/pods/waiting/log"] << 400 << status
            emulator["get /api/v1/namespaces/default/pods/running/log"] << b"step 1\n"
            # Release 1.20 answers with this, later ones with the service.
            deleted = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
            emulator["delete /api/v1/namespaces/default/services/old"] << deleted
            async with kmock.Server(emulator, host="127.0.0.1") as server:
                self.url = str(server.url)
                self._up.set()
                await self._down.wait()

    def __enter__(self) -> Server:
        self._thread.start()
        assert self._up.wait(30), "the API server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._down.set)
        self._thread.join(30)
