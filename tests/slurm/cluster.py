"""A real Slurm on this host: munged, slurmctld and one slurmd a node, from Debian's packages, as root, in a folder."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil
from ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")


def missing_programs() -> list[str]:
    """What Debian's `slurm-wlm` and `munge` would bring."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Cluster:
    """Nodes n1, n2, ... with 64 pretended cores and eight pretended GPUs each.

    Partition `main` is the default; of the same nodes, jobs in `urgent` preempt those in `spot` after `grace` seconds, with the
    jobs' own `--signal` if `user_signal`.

    Args:
        folder: short, for the sockets' paths.
        nodes: how many.
        user_signal: `preempt_send_user_signal`.
        grace: seconds.
        first_job: number of the first job; slurm/lib.sh derives a port from it, so two clusters need different ones.
    """

    def __init__(
        self, folder: Path, nodes: int = 4, *, user_signal: bool = True, grace: int = 30, first_job: int = 1
    ) -> None:
        self.folder, self.nodes = folder, nodes
        self.given_up = False
        """Once set, every thread that waits for a job ends with an error."""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._user_signal, self._grace, self._first_job = user_signal, grace, first_job

    def __enter__(self) -> "Cluster":
        for name in ("munge", "state", "spool", "log"):
            (self.folder / name).mkdir(parents=True, mode=0o700)
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        for name in [
            name for name in self.environment if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"
        ]:
            del self.environment[name]  # of a job that runs these tests
        self._configure()
        try:
            self._start_munged()
            self._start("slurmctld", "-D", "-i")
            for number in range(1, self.nodes + 1):
                self.start_node(f"n{number}")
            self.wait_for(lambda: self._states() == {"idle": self.nodes}, 60)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._processes):
            process.kill()
        for process in self._processes:
            process.wait()
        # Steps and what they run outlive their slurmd. (A step's title lies over the start of its environment.)
        ours = f"SLURM_CONF={self.environment['SLURM_CONF']}\0".encode()
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if ours in environment.read_bytes():
                    os.kill(int(environment.parent.name), signal.SIGKILL)

    def run(self, *command: str, **options: object) -> str:
        """Output of a command of Slurm."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return str(result.stdout)

    def sbatch(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """Submit; the job's number."""
        result = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            env={**self.environment, **environment}, cwd=cwd, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def hosts(self, number: str) -> list[str]:
        """The nodes of a job."""
        return self.run("scontrol", "show", "hostnames", self.job(number)["NodeList"]).split()

    def wait(self, number: str, states: tuple[str, ...], seconds: float = 180) -> str:
        """Wait until the job is in one of the states; its state then."""
        state = ""

        def is_there() -> bool:
            nonlocal state
            state = self.job(number)["JobState"]
            return state in states

        self.wait_for(is_there, seconds, lambda: f"job {number} is {state}", interval=1.0)
        return state

    def wait_for(
        self, condition: Callable[[], bool], seconds: float, say: Callable[[], str] = lambda: "", interval: float = 0.1
    ) -> None:
        """Ask every `interval` seconds. A command of Slurm costs 20 ms of a core: ask for a file where there is one."""
        end = time.monotonic() + seconds
        while not condition():
            died = [process.args[4] for process in self._processes if process.poll() is not None]  # type: ignore[index]
            if died:
                logs = "\n".join(f"{path}:\n{path.read_text()[-1500:]}" for path in (self.folder / "log").glob("*.out"))
                raise AssertionError(f"{died} have ended\n{logs}")
            if self.given_up:
                raise AssertionError("the tests end")
            if time.monotonic() > end:
                raise AssertionError(f"after {seconds:g} s: {say()}; nodes: {self._states()}")
            time.sleep(interval)

    def start_node(self, name: str) -> subprocess.Popen[bytes]:
        """A node's daemon."""
        return self._start("slurmd", "-D", "-N", name)

    def lose_node(self, name: str) -> None:
        """Its daemon and everything that runs there end at once."""
        self._processes = [process for process in self._processes if list(process.args)[-1] != name]  # type: ignore[arg-type]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if environment.get("SLURM_CONF") != self.environment["SLURM_CONF"]:
                    continue  # another cluster has a node of this name
                if environment.get("SLURMD_NODENAME") == name:
                    parent = process.parent()
                    if parent is not None and parent.name() == "slurmstepd":
                        parent.kill()
                    process.kill()
                elif process.cmdline()[-2:] == ["-N", name]:
                    process.kill()
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=lost")

    def _states(self) -> dict[str, int]:
        lines = subprocess.run(
            ["sinfo", "-h", "-p", "main", "-o", "%t %D"], env=self.environment, capture_output=True, text=True
        ).stdout.split("\n")
        return {line.split()[0]: int(line.split()[1]) for line in lines if line}

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        log = (self.folder / "log" / f"{command[0]}-{len(self._processes)}.out").open("ab")
        with log:
            # A session of its own: a Ctrl-C in the tests is not for them; but they end with the tests, however those end.
            held = ("setpriv", "--pdeathsig", "KILL", "--", *command)
            process = subprocess.Popen(held, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self._processes.append(process)
        return process

    def _start_munged(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        self._start(
            "munged", "--foreground", "--force", f"--key-file={munge / 'key'}", f"--socket={munge / 'socket'}",
            f"--pid-file={munge / 'pid'}", f"--log-file={munge / 'log'}", f"--seed-file={munge / 'seed'}",
        )  # fmt: skip
        self.wait_for((munge / "socket").exists, 20)

    def _configure(self) -> None:
        controller, *ports = free_ports(self.nodes + 1)
        self.host = socket.gethostname()
        folder = self.folder
        nodes = "\n".join(
            f"NodeName=n{number} NodeHostname={self.host} NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=16000 Gres=gpu:8"
            for number, port in enumerate(ports, 1)
        )
        warning = "SlurmctldParameters=preempt_send_user_signal" if self._user_signal else ""
        for number in range(8):  # slurmd counts files
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        (folder / "slurm.conf").write_text(f"""\
ClusterName=scfm
SlurmctldHost={self.host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
{warning}
SchedulerParameters=batch_sched_delay=1,bf_interval=2,sched_interval=2
ReturnToService=2
SlurmdTimeout=20
KillWait=90
InactiveLimit=0
JobRequeue=1
MinJobAge=3600
FirstJobId={self._first_job}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=spot Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={self._grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
""")
