"""A real Slurm on this machine: munge, slurmctld, and two slurmd as nodes of eight cores and two
GPUs each, which are not there. It needs root and Debian's packages slurm-wlm and munge.

    apt install slurm-wlm munge; pip install snakemake-executor-plugin-slurm==2.8.0
    python tests/slurm_here.py snakemake --workflow-profile workflow/profiles/slurm --configfile ...

runs a command in a cluster that ends with it.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
ETC = Path("/etc/slurm")  # where all of Slurm looks; the plugin takes SLURM_CONF from its jobs
CONFIG = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
ReturnToService=2
KillWait=5
GresTypes=gpu
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} {size}
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} {size}
PartitionName=gpu Nodes=one,two Default=YES State=UP
"""
SIZE = "CPUs=8 RealMemory=64000 Gres=gpu:2"
GPUS = "NodeName=one,two Name=gpu File=/dev/tty[1-2]\n"  # any two files


def missing() -> list[str]:
    """What a cluster here lacks: commands, or that the user is root."""
    return [name for name in NEEDED if shutil.which(name) is None] + ["root"] * (os.getuid() != 0)


@contextmanager
def slurm() -> Iterator[None]:
    """A cluster for the body of a `with`. At the end its jobs are cancelled and its daemons ended.

    Raises FileExistsError if the machine has a Slurm of its own, RuntimeError, with what the
    daemons said, if the nodes are not there after a minute.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    host, ports = socket.gethostname().partition(".")[0], _free_ports(3)
    config = CONFIG.format(folder=folder, host=host, ports=ports, size=SIZE)
    files = {"slurm.conf": config, "gres.conf": GPUS}
    daemons: list[subprocess.Popen] = []
    log = open(folder / "log", "w+")  # noqa: SIM115 (closed below)

    def start(*command: str) -> None:
        outputs = {"stdout": log, "stderr": log, "start_new_session": True}
        daemons.append(subprocess.Popen(command, cwd=folder, **outputs))

    def wait_for(condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 60
        while not condition():
            if time.monotonic() > until:
                raise RuntimeError(f"No Slurm here:\n{(folder / 'log').read_text()}")
            time.sleep(0.5)

    ETC.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
        if (ETC / name).is_symlink() and not (ETC / name).exists():
            (ETC / name).unlink()  # of a cluster here that was killed
        (ETC / name).symlink_to(folder / name)
    try:
        own = {"key-file": "key", "socket": "socket", "seed-file": "seed", "pid-file": "pid"}
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        munge = [f"--{option}={folder}/munge.{ending}" for option, ending in own.items()]
        start("munged", "--foreground", "--force", *munge)  # whatever folder this is in
        wait_for((folder / "munge.socket").exists)
        start("slurmctld", "-D")
        for node in ("one", "two"):
            start("slurmd", "-D", "-N", node)
        wait_for(
            lambda: _answer_of("sinfo", "--noheader", "--format=%t %D").split() == ["idle", "2"]
        )
        yield
    finally:
        _answer_of("scancel", "--me")
        wait_for(lambda: not _answer_of("squeue", "--noheader"))
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()
        log.close()
        for name in files:
            (ETC / name).unlink()
        shutil.rmtree(folder)


def _answer_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


if __name__ == "__main__":
    if lacking := missing():
        sys.exit(f"No Slurm here without {', '.join(lacking)}")
    with slurm():
        sys.exit(subprocess.run(sys.argv[1:]).returncode)
