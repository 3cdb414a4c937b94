"""Two hosts on one machine: network namespaces that a cable connects, which can be cut. Linux, root and iproute2."""

import contextlib
import itertools
import os
import shutil
import subprocess

from training_runs import INJECT

ADDRESS = "10.77.0.{}"
_numbers = itertools.count()
_URL = f"tcp://{ADDRESS.format(1)}:29500"
# Detectron2's launcher starts new processes, whose imports take long: here they are forks.
_SCRIPT = (
    INJECT
    + """
import functools
torch.multiprocessing.start_processes = functools.partial(torch.multiprocessing.start_processes, start_method="fork")
{}
run_command_line()
"""
)


class Hosts:
    """Two network namespaces and the link between them.

    Raises:
        OSError: they cannot be made here; holds the reason.
    """

    def __init__(self):
        number = next(_numbers)
        self.names = [f"host{i}-{os.getpid()}-{number}" for i in (1, 2)]
        one, two = self.names
        try:
            for name in self.names:
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            _ip("link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", two)
            for number, name in enumerate(self.names, 1):
                _ip("-n", name, "address", "add", f"{ADDRESS.format(number)}/24", "dev", "cable")
                _ip("-n", name, "link", "set", "cable", "up")
        except OSError:
            self.remove()
            raise

    def cut(self) -> None:
        """Cuts the cable: packets vanish, and no connection is told."""
        _ip("-n", self.names[1], "link", "set", "cable", "down")

    def lose_packets(self, percent: int) -> None:
        """Drops so many of the packets that reach the second host.

        Raises:
            OSError: there is no nftables.
        """
        rule = f"add rule netdev t c numgen random mod 100 < {percent} counter drop"
        table = "add table netdev t; add chain netdev t c { type filter hook ingress device cable priority 0; }"
        _ip("netns", "exec", self.names[1], "nft", f"{table}; {rule}")

    def count_lost_packets(self) -> int:
        rules = _ip("netns", "exec", self.names[1], "nft", "list", "table", "netdev", "t")
        return int(rules.split("counter packets ")[1].split()[0])

    def remove(self) -> None:
        for name in self.names:
            with contextlib.suppress(OSError):
                _ip("netns", "delete", name)

    def run(self, host: int, script: str = "") -> dict:
        """Arguments of :class:`training_runs.Run` for a host's part of a run on both.

        Args:
            host: 0 or 1.
            script: Python that injects a fault, see ``training_runs.INJECT``.
        """
        return {
            "namespace": self.names[host],
            "script": _SCRIPT.format(script),
            "flags": ["--num-machines", "2", "--machine-rank", str(host), "--dist-url", _URL],
            "environ": {"GLOO_SOCKET_IFNAME": "cable"},
        }


def _ip(*arguments: str) -> str:
    if not shutil.which("ip"):
        raise OSError("there is no `ip`")
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
