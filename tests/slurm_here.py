"""A real Slurm on this machine: munge, slurmctld, and two slurmd as nodes of eight cores and two
GPUs each, which are not there. Root, and Debian's packages slurm-wlm and munge, are needed.

    apt install slurm-wlm munge; pip install snakemake-executor-plugin-slurm==2.8.0
    python tests/slurm_here.py snakemake --workflow-profile workflow/profiles/slurm --configfile ...

runs a command in a cluster that ends with it. All files lie in a new folder; no service of the
machine is touched.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
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
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
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
    """What is not installed of what a cluster here needs; `root` where the user is another."""
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
    found = [name for name in NEEDED if shutil.which(name, path=path) is None]
    return found + ["root"] * (os.getuid() != 0)


@contextmanager
def slurm() -> Iterator[dict[str, str]]:
    """A cluster for the body of a `with`; the variables with which its commands find it. At the end
    its jobs are cancelled and its daemons ended. Raises RuntimeError, with their logs, if its nodes
    are not there after a minute."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    host, ports = socket.gethostname().partition(".")[0], _free_ports(3)
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(folder=folder, host=host, ports=ports, size=SIZE))
    (folder / "gres.conf").write_text(GPUS)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
    variables = {"SLURM_CONF": str(config), "PATH": path}
    munge = ["--key-file", "munge.key", "--socket", "munge.socket", "--seed-file", "munge.seed"]
    daemons: list[subprocess.Popen] = []

    def start(*command: str) -> None:
        log = open(folder / f"{command[-1]}.out", "w")
        daemons.append(
            subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )  # fmt: skip
        )

    def ask(*command: str) -> str:
        return subprocess.run(
            command, env=os.environ | variables, capture_output=True, text=True, timeout=60
        ).stdout

    paths = [str(folder / one) if one[0] != "-" else one for one in munge]
    try:
        start("munged", "--foreground", *paths, "--pid-file", str(folder / "munged.pid"))
        _wait(folder / "munge.socket")
        start("slurmctld", "-D", "-f", str(config))
        for node in ("one", "two"):
            start("slurmd", "-D", "-N", node)
        until = time.monotonic() + 60
        while ask("sinfo", "--noheader", "--format=%t %D").split() != ["idle", "2"]:
            if time.monotonic() > until:
                logs = [file.read_text(errors="replace") for file in folder.glob("*.log")]
                raise RuntimeError("Slurm has no nodes here:\n" + "\n".join(logs))
            time.sleep(0.5)
        yield variables
    finally:
        with suppress(subprocess.TimeoutExpired):
            ask("scancel", "--user=root")
            while ask("squeue", "--noheader"):
                time.sleep(0.5)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            daemon.wait(timeout=30)
        shutil.rmtree(folder)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait(file: Path) -> None:
    until = time.monotonic() + 30
    while not file.exists():
        if time.monotonic() > until:
            raise RuntimeError(f"{file} does not appear: is munged there?")
        time.sleep(0.1)


if __name__ == "__main__":
    if lacking := missing():
        sys.exit(f"No Slurm here without {', '.join(lacking)}")
    with slurm() as variables:
        sys.exit(subprocess.run(sys.argv[1:], env=os.environ | variables).returncode)
