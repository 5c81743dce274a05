"""Two processes over gloo, and accelerate's own FSDP2 on a CPU, where it would otherwise not shard."""

from __future__ import annotations

import datetime
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import kanformer
from kanformer.training.sharding import make_contiguous, no_split_modules
from model_cases import BY_NAME, disturb
from training_cases import ROOT

EDGES = {
    "shared": {},
    "groups": {"groups": 8, "basis": "chebyshev"},
    "rational": {"basis": "rational", "groups": 8},
    "full": {"edges": "full", "grid_size": 3},
    "full-rational": {"edges": "full", "basis": "rational"},
}


def patched(name: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """A tiny model, calibrated and patched, its functions bent."""
    model = BY_NAME[name].build(dtype)
    return disturb(kanformer.patch_model(model, calibration=[BY_NAME[name].inputs(dtype)], keep_original=False, **settings))


def shard(model: nn.Module, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    """`fully_shard` as accelerate's TRANSFORMER_BASED_WRAP does it: the units that the names tell, innermost first, then the whole."""
    make_contiguous(model)
    names = no_split_modules(model)
    options = {} if policy is None else {"mp_policy": policy}
    for module in reversed(list(model.modules())):
        if type(module).__name__ in names:
            fully_shard(module, **options)
    return fully_shard(model, **options)


def join_two(folder: str, rank: int) -> None:
    """This process becomes one of two."""
    where = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=100))


def leave(said: str) -> None:
    """Prints a line and ends, past the interpreter's own way of ending, which now and then aborts while gloo's threads still run."""
    torch.distributed.barrier()
    print(said, flush=True)
    os._exit(0)


def two(code: str, *words: str, folder: Path) -> list[str]:
    """Runs Python code in two processes, each of them sees (rank, folder, *words) in sys.argv; what they print."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "KANFORMER_BACKEND": "eager",
    }
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen([*command, str(rank), str(folder), *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = []
    for process in running:
        out, err = process.communicate(timeout=150)
        assert process.returncode == 0, err[-2000:]
        said.append(out)
    return said


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def shard_on_cpu(rank: int, port: str) -> None:
    """From here on this process is one of two that accelerate started, and accelerate shards by FSDP2 although there is no GPU.

    accelerate picks FSDP for accelerators only, and silently takes DistributedDataParallel on a CPU; everything behind that choice runs as on GPUs.
    """
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_FSDP="true")
    os.environ.update({f"FSDP_{name.upper()}": str(value) for name, value in fsdp_config().items()})
    init = Accelerator.__init__

    def forced(self, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        plugin = FullyShardedDataParallelPlugin()
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)
        self.state.fsdp_plugin, self.state.distributed_type = plugin, DistributedType.FSDP
        assert self.is_fsdp2

    Accelerator.__init__ = forced  # type: ignore[method-assign]
    Accelerator.end_training = lambda self: None  # type: ignore[method-assign]  # which leaves the other process: the next run needs it


def fsdp_config() -> dict[str, Any]:
    """What configs/accelerate/fsdp2.yaml says, without the prefix of its keys."""
    import yaml

    values = yaml.safe_load((ROOT / "configs/accelerate/fsdp2.yaml").read_text(encoding="utf-8"))
    return {name.removeprefix("fsdp_"): value for name, value in values["fsdp_config"].items()}
