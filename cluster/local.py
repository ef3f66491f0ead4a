"""This machine as a site: one run at a time on each GPU, or without GPUs a few side by side."""

import torch
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.jobs.error_handlers import windowed_error_handler
from parsl.providers import LocalProvider

from workbench.datasets.threads import usable_cores
from workbench.sites import NodeLauncher

GPUS = torch.cuda.device_count()  # EDIT to leave some to others; CUDA_VISIBLE_DEVICES chooses which
WORKERS = GPUS or min(4, usable_cores())  # EDIT: runs at one time

config = Config(
    executors=[
        HighThroughputExecutor(
            label="local",
            address="127.0.0.1",
            available_accelerators=GPUS,
            max_workers_per_node=WORKERS,
            cores_per_worker=usable_cores() / WORKERS,
            heartbeat_period=5,
            heartbeat_threshold=30,
            block_error_handler=windowed_error_handler,
            provider=LocalProvider(init_blocks=1, max_blocks=1, launcher=NodeLauncher()),
        )
    ],
    strategy_period=1,
)
