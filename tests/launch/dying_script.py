"""A script over gloo in which one worker is killed in each attempt but the last."""

import os
import signal
import sys

import torch
import torch.distributed as dist

if __name__ == "__main__":
    deaths = int(sys.argv[1])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("gloo")
    for step in range(3):
        value = torch.ones(1)
        dist.all_reduce(value)
        if attempt < deaths and step == 1 and dist.get_rank() == attempt % dist.get_world_size():
            os.kill(os.getpid(), signal.SIGKILL)
    print("all arrived:", int(value.item()), flush=True)
    dist.destroy_process_group()
