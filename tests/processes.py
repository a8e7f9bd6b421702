"""Two processes that talk on loopback: what the fixture ``two_processes`` starts in each."""

import torch
from torch import distributed


def run(rank, store, function, arguments):
    """Call a function of a rank, and more, inside a process group."""
    torch.set_num_threads(1)
    # Each process learns the other's address from a file: no port to choose, which another run of
    # the tests could take, and then wait in the wrong group.
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    function(rank, *arguments)
    distributed.destroy_process_group()
