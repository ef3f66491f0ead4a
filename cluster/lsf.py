"""An LSF cluster as a site. Each job has one host, and runs as many notebooks at one time as its GPUs allow.

A job that is told to stop, two minutes before its time is up or by `bkill`, writes checkpoints; another job goes on.
"""

import sys
from pathlib import Path

from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.jobs.error_handlers import windowed_error_handler
from parsl.providers import LSFProvider

from workbench.sites import NodeLauncher, own_address

QUEUE, PROJECT = "gpu", None  # EDIT: `bqueues` lists queues
GPUS, OF_A_RUN, CORES = 4, 1, 32  # EDIT: of each job; and GPUs of each run in it (its `devices`)
JOBS, WALLTIME = 8, "12:00:00"  # EDIT: jobs at one time, and the time of each, well above two minutes
ENVIRONMENT = f'export PATH="{Path(sys.executable).parent}:$PATH"'  # EDIT where hosts have another one: `module load …`

place = {"queue": QUEUE, "project": PROJECT, "request_by_nodes": False, "bsub_redirection": True}
pins = [",".join(map(str, range(first, first + OF_A_RUN))) for first in range(0, GPUS, OF_A_RUN)]
warning = "#BSUB -wa USR1\n#BSUB -wt 2"


class Provider(LSFProvider):
    """Looks after its jobs more often than once a minute, so that another one soon follows one that has ended."""

    status_polling_interval = 15


config = Config(
    executors=[
        HighThroughputExecutor(
            label="lsf",
            address=own_address(),  # at which hosts reach this machine
            available_accelerators=pins,
            max_workers_per_node=len(pins),
            cores_per_worker=CORES / len(pins),
            heartbeat_period=10,
            heartbeat_threshold=60,
            block_error_handler=windowed_error_handler,
            provider=Provider(
                **place,
                walltime=WALLTIME,
                scheduler_options=f"{warning}\n#BSUB -gpu num={GPUS}",
                worker_init=f"{ENVIRONMENT}\nexport PARSL_CORES={CORES}",
                cores_per_block=CORES,
                cores_per_node=CORES,
                init_blocks=1,
                max_blocks=JOBS,
                launcher=NodeLauncher(),
            ),
        )
    ],
)
driver = Provider(
    **place,
    walltime="24:00:00",
    scheduler_options=warning,
    worker_init=ENVIRONMENT,
    cores_per_block=1,
    cores_per_node=1,
)
