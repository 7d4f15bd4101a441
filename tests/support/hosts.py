"""Hosts for tests: network namespaces with addresses of their own, joined by a bridge."""

import os
import string
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle

import pytest

LETTERS = cycle(string.ascii_lowercase)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Host:
    """A network namespace, joined to a bridge by an interface called eth0."""

    def __init__(self, number: int, bridge: str):
        self.name, self.address = f"{bridge}h{number}", f"10.213.7.{number}"
        self.cable = f"{bridge}v{number}"
        self.inside = ("ip", "netns", "exec", self.name)
        ip("netns", "add", self.name)
        ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", self.cable, "master", bridge, "up")
        for words in (["link", "set", "lo", "up"], ["addr", "add", f"{self.address}/24", "dev", "eth0"]):
            ip("-n", self.name, *words)
        ip("-n", self.name, "link", "set", "eth0", "up")

    def cut_off(self) -> None:
        ip("link", "set", self.cable, "down")

    def remove(self) -> None:
        ip("netns", "del", self.name)


@contextmanager
def bridge(num_hosts: int) -> Iterator[list[Host]]:
    """Hosts that reach each other, and are reached from here."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    name = f"p{os.getpid() % 100000}{next(LETTERS)}"  # the kernel takes its time to take the one before away
    try:
        ip("link", "add", name, "type", "bridge")
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"this machine does not let root make a network: {e}")
    made: list[Host] = []
    try:
        ip("addr", "add", "10.213.7.254/24", "dev", name)
        ip("link", "set", name, "up")
        for number in range(1, num_hosts + 1):
            made.append(Host(number, name))
        yield made
    finally:
        for host in made:
            host.remove()
        subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)
