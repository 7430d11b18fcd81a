"""A backend: `torch.distributed`, with a record of how often it was used."""

from pathlib import Path

from distopt.backends.torch_dist import TorchDist


class Counting(TorchDist):
    """Writes the number of all-reduces of each rank to a file in the current folder when it is closed."""

    name = "counting"
    num_all_reduces = 0

    def all_reduce(self, tensor, op="sum"):
        self.num_all_reduces += 1
        return super().all_reduce(tensor, op)

    def close(self):
        if not self.closed:
            Path(f"all-reduces-of-rank-{self.rank}").write_text(str(self.num_all_reduces))
        super().close()
