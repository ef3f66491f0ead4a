"""A Slurm cluster as a site. Each job has one node, and runs as many notebooks at one time as its GPUs allow.

A job that is told to stop, two minutes before its time is up or by `scancel`, writes checkpoints; another job goes on.
"""

import sys
from pathlib import Path

from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.jobs.error_handlers import windowed_error_handler
from parsl.providers import SlurmProvider

from workbench.sites import NodeLauncher, own_address

PARTITION, ACCOUNT = "gpu", None  # EDIT: `sinfo -s` lists partitions
GPUS, OF_A_RUN, CORES, MEMORY_GB = 4, 1, 32, 128  # EDIT: of each job; and GPUs of each run in it (its `devices`)
JOBS, WALLTIME = 8, "12:00:00"  # EDIT: jobs at one time, and the time of each, well above two minutes
ENVIRONMENT = f'export PATH="{Path(sys.executable).parent}:$PATH"'  # EDIT where nodes have another one: `module load …`

place = {"partition": PARTITION, "account": ACCOUNT, "worker_init": ENVIRONMENT, "exclusive": False}
pins = [",".join(map(str, range(first, first + OF_A_RUN))) for first in range(0, GPUS, OF_A_RUN)]
warning = "#SBATCH --signal=B:USR1@120"


class Provider(SlurmProvider):
    """Looks after its jobs more often than once a minute, so that another one soon follows one that has ended."""

    status_polling_interval = 15


config = Config(
    executors=[
        HighThroughputExecutor(
            label="slurm",
            address=own_address(),  # at which nodes reach this machine
            available_accelerators=pins,
            max_workers_per_node=len(pins),
            cores_per_worker=CORES / len(pins),
            heartbeat_period=10,
            heartbeat_threshold=60,
            block_error_handler=windowed_error_handler,
            provider=Provider(
                **place,
                walltime=WALLTIME,
                scheduler_options=warning,
                gpus_per_node=GPUS,
                cores_per_node=CORES,
                mem_per_node=MEMORY_GB,
                init_blocks=1,
                max_blocks=JOBS,
                cmd_timeout=60,
                launcher=NodeLauncher(),
            ),
        )
    ],
)
driver = Provider(**place, walltime="24:00:00", scheduler_options=warning, cores_per_node=1, mem_per_node=4)
