"""A Slurm cluster of two nodes on this machine: daemons, ports and files of its own, nothing left when it stops.

The packages come from the distribution where they are missing and this is allowed. Accounting is slurmdbd on a private
MariaDB, so that `sacct` answers. Every process of the cluster carries its SLURM_CONF in the environment.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "srun", "sbatch", "sacct", "mariadbd")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "slurmdbd", "mariadb-server-core")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
POLICY = Path("/usr/sbin/policy-rc.d")
WAIT_SECONDS = 400.0
# A job that is on its way, in some of these for a moment only: a signal is being sent, it goes back to the queue.
NOT_ENDED = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SIGNALING", "REQUEUED", "SUSPENDED", "STOPPED")

SLURM_CONF = """
ClusterName=megamf
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge_socket}
StateSaveLocation={state}/ctld
SlurmdSpoolDir={state}/%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd.%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={munge_socket}
JobRequeue=1
ReturnToService=2
KillWait=5
SlurmdTimeout=20
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1_port} {cores}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2_port} {cores}
PartitionName=batch Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=shared Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF OverSubscribe=FORCE:20
"""
CORES = "CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=100"

SLURMDBD_CONF = """
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={munge_socket}
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
LogFile={state}/slurmdbd.log
PidFile={state}/slurmdbd.pid
"""


def missing_programs() -> list[str]:
    """Which programs of the cluster this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def unavailable() -> str | None:
    """Install what is missing where that is allowed; the reason why there can be no cluster here, None if there can."""
    if not sys.platform.startswith("linux"):
        return f"Slurm needs Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return "Slurm's daemons start jobs as root, and these tests do not run as root"
    if not (missing := missing_programs()):
        return None
    if shutil.which("apt-get") is None:
        return f"{', '.join(missing)} missing, and there is no apt-get to install them with"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    made_policy = not POLICY.exists()
    try:
        if made_policy:  # the packages would start daemons of their own
            POLICY.write_text("#!/bin/sh\nexit 101\n")
            POLICY.chmod(0o755)
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(
                ["apt-get", "-qq", *command], env=environment, capture_output=True, text=True, timeout=400
            )
            if done.returncode:
                return f"apt-get {command[0]} failed: {done.stderr.strip()[-300:]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"installing {', '.join(PACKAGES)} failed: {error}"
    finally:
        if made_policy:
            POLICY.unlink(missing_ok=True)
    return (
        f"the packages {', '.join(PACKAGES)} bring no {', '.join(missing)}" if (missing := missing_programs()) else None
    )


class Cluster:
    """Nodes n1 and n2 with two cores each, partitions `batch`, `urgent` and `shared`.

    Jobs in `urgent` preempt those in `batch`; in `shared` a core runs many jobs.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        # Paths of sockets may not be longer than about 100 characters.
        self.sockets = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.sockets.chmod(0o711)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "MEGAMF"))},
            "PATH": PATH,
            "SLURM_CONF": str(state / "slurm.conf"),
            "MYSQL_UNIX_PORT": str(self.sockets / "mysql"),
        }
        self.daemons: dict[str, subprocess.Popen] = {}
        self.requeued: dict[tuple[str, str], float] = {}

    def start(self) -> None:
        """Every daemon, in the order in which they need each other, until both nodes are idle."""
        ports = free_ports(4)
        facts = {
            "host": socket.gethostname().split(".")[0],
            "state": self.state,
            "munge_socket": self.sockets / "munge",
            "cores": CORES,
            **dict(zip(("ctld_port", "dbd_port", "n1_port", "n2_port"), ports)),
        }
        for folder in ("ctld", "n1", "n2", "mysql"):
            (self.state / folder).mkdir()
        (self.state / "slurm.conf").write_text(SLURM_CONF.format(**facts))
        (self.state / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**facts))
        (self.state / "slurmdbd.conf").chmod(0o600)
        self._start_munge()
        self._start_accounting()
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start_node(node)
        self.wait_for("two idle nodes", lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2")

    def _start_munge(self) -> None:
        key = self.state / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{name}-file={self.state / 'munge'}.{name}" for name in ("key", "pid", "seed", "log")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.sockets / 'munge'}", *files)
        self.wait_for("munged", (self.sockets / "munge").exists)

    def _start_accounting(self) -> None:
        # The database is reached through a socket that only this user can open: it needs no accounts.
        options = ("--no-defaults", "--user=root", f"--datadir={self.state / 'mysql'}", "--skip-grant-tables")
        tables = min(Path("/usr/share/mysql").glob("*_system_tables.sql")).read_text()
        subprocess.run(
            ["mariadbd", *options, "--bootstrap"], env=self.environment, check=True, capture_output=True, text=True,
            input=f"create database mysql;\nuse mysql;\n{tables}",
        )  # fmt: skip
        files = (f"--socket={self.sockets / 'mysql'}", f"--pid-file={self.state / 'mysql.pid'}")
        self._daemon("mariadbd", *options, *files, "--skip-networking", "--innodb-flush-log-at-trx-commit=0")
        self.wait_for("mariadbd", (self.sockets / "mysql").exists)
        self._daemon("slurmdbd", "-D")
        self.wait_for("slurmdbd", lambda: not self.attempt("sacctmgr", "-i", "add", "cluster", "megamf").returncode)

    def wait_for(self, what: str, condition: Callable[[], Any], seconds: float = WAIT_SECONDS) -> Any:
        """Poll until the condition is true and return it; AssertionError when it takes too long or a daemon ends."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            ended = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            logs = "".join((self.state / f"{name}.log").read_text()[-1500:] for name in ended)
            assert not ended, f"{what}: {', '.join(ended)} ended\n{logs}"
            assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
            time.sleep(0.2)
        return value

    def start_node(self, name: str) -> None:
        """The slurmd of a node that is not running."""
        self._daemon(f"slurmd-{name}", "-D", "-N", name)

    def _daemon(self, name: str, *options: str) -> None:
        with (self.state / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [name.split("-")[0], *options], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def attempt(self, *command: str, **variables: str) -> subprocess.CompletedProcess:
        """Run one of Slurm's commands; the outcome may be a failure."""
        environment = self.environment | variables
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    def run(self, *command: str, **variables: str) -> str:
        """Run one of Slurm's commands and return what it prints; AssertionError with its complaint where it fails."""
        done = self.attempt(*command, **variables)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}{done.stdout}"
        return done.stdout

    def submit(self, *words: str | Path, **variables: str) -> str:
        """sbatch; returns the id of the job."""
        return self.run("sbatch", "--parsable", *map(str, words), **variables).strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows of it."""
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, job: str) -> dict[str, str] | None:
        """The job if it has ended for good; one that waits for its next start is hurried on."""
        found = self.job(job)
        if found["JobState"] == "PENDING" and found["Reason"] == "BeginTime":
            # Slurm lets a requeued job wait for two minutes. Within the second of its end nodes would refuse it.
            seen = self.requeued.setdefault((job, found["Restarts"]), time.monotonic())
            if time.monotonic() - seen > 3:
                self.attempt("scontrol", "update", f"JobId={job}", "StartTime=now")
        return None if found["JobState"] in NOT_ENDED else found

    def finish(self, job: str, seconds: float = WAIT_SECONDS) -> dict[str, str]:
        """Wait for the end of a job."""
        return self.wait_for(f"the end of job {job}", lambda: self.ended(job), seconds)

    def sacct(self, job: str, *options: str) -> str:
        """All starts of a job that has ended, and their steps without `--allocations`."""
        columns = "JobID%10,JobName%18,Partition%9,State%12,ExitCode%8,Start,Elapsed,NNodes%6,NTasks%6,NodeList%9"

        def settled() -> str | None:
            # The accounts follow behind: a job may be there without its name, or not have ended yet.
            found = self.run("sacct", *options, "--duplicates", "-j", job, f"--format={columns}")
            return None if any(word in found for word in ("allocation", "RUNNING", "PENDING", "Unknown")) else found

        return self.wait_for(f"the accounts of job {job}", settled)

    def processes(self) -> list[int]:
        """Every process of the cluster: daemons, step managers and what jobs have started."""
        mark = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def processes_of(self, node: str) -> list[int]:
        """A node's slurmd, the tasks that it runs, and their step managers."""
        mark = f"SLURMD_NODENAME={node}".encode()
        found = {self.daemons[f"slurmd-{node}"].pid}
        for pid in self.processes():
            if mark in (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0"):
                found |= {pid, *(parent for parent in ancestors(pid) if "slurmstepd" in title(parent))}
        return sorted(found)

    def stop(self) -> None:
        """Cancel the jobs, end the daemons, and kill by process id whatever is left."""
        self.attempt("scancel", "--user=root")
        with suppress(AssertionError):
            self.wait_for("the end of all jobs", lambda: not self.attempt("squeue", "-h").stdout.strip(), 20)
        for name in reversed(self.daemons):
            self.daemons[name].send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.daemons[name].wait(20)
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for daemon in self.daemons.values():
            daemon.wait(20)
        shutil.rmtree(self.sockets, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Different ports nobody listens on at this moment."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def title(pid: int) -> str:
    """The command line of a process."""
    return (Path("/proc") / str(pid) / "cmdline").read_text().replace("\0", " ")


def ancestors(pid: int) -> list[int]:
    """Parent, its parent, and so on."""
    parent = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    return [] if parent <= 1 else [parent, *ancestors(parent)]
