"""A user's script that sums over all workers, with whichever library its launcher belongs to."""

import json
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

import distopt

if __name__ == "__main__":
    seconds = float(sys.argv[1])
    timeout = timedelta(seconds=float(os.environ.get("SUM_TIMEOUT_S", "30")))
    backend = distopt.init(os.environ.get("SUM_BACKEND", "auto"), timeout=timeout)
    end = time.monotonic() + seconds
    going_on = torch.ones(1)
    while going_on.item():
        total = torch.ones(1)
        backend.all_reduce(total).wait()
        going_on.fill_(float(time.monotonic() < end))
        backend.all_reduce(going_on, "min").wait()
        if sys.argv[2:] == [str(backend.rank)]:
            os._exit(0)
        Path(f"summed-{backend.world_size}-{backend.rank}").touch()
        time.sleep(0.05)
    secret = os.environ.get("MY_API_TOKEN")
    result = {"total": total.item(), "host": socket.gethostname(), "library": backend.name, "secret": secret}
    result["greeting"] = os.environ.get("GREETING")
    Path(f"sum-{backend.rank}.json").write_text(json.dumps(result))
    backend.close()
