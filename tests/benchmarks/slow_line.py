"""A slow line on one machine: two network namespaces, and between them so many bits a second, so many seconds late.

What goes in at one end is read packet by packet, held back as long as a line of that rate and length would take, and
put out at the other: nothing is lost, and nothing is on the machine's own network. For a process in a namespace of its
own (`unshare --net --map-root-user`), which is the near end; `SlowLine.far` runs commands at the far one. Needs no
kernel module but tun, where `tc` would need netem.
"""

import fcntl
import os
import queue
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

NEAR, FAR = "10.9.0.1", "10.9.0.2"
_MTU = 60_000
"""A packet of it takes 5 ms at 100 Mbit/s, and this program a few hundred of them a second."""


@dataclass(frozen=True)
class SlowLine:
    """Both ends."""

    near: str
    """Address of this process's end."""
    other: str
    """Address of the far end."""
    far: tuple[str, ...]
    """What a command begins with that runs there."""


@contextmanager
def slow_line(bits_per_s: float, round_trip_s: float) -> Iterator[SlowLine]:
    """Lay a line; both ways have the rate, each half of the delay."""
    near, (here, there) = _end_of_line(NEAR, FAR), socket.socketpair(socket.AF_UNIX)
    program = [sys.executable, __file__, str(there.fileno())]
    keeper = subprocess.Popen(["unshare", "--net", *program], pass_fds=[there.fileno()], stdin=subprocess.PIPE)
    try:
        _, (far, *_), _, _ = socket.recv_fds(here, 1, 1)
        for source, sink in ((near, far), (far, near)):
            _carry(source, sink, bits_per_s, round_trip_s / 2)
        yield SlowLine(NEAR, FAR, ("nsenter", f"--net=/proc/{keeper.pid}/ns/net", "--"))
    finally:
        keeper.kill()
        keeper.communicate()


def _carry(source: int, sink: int, bits_per_s: float, late_s: float) -> None:
    """One way of the line, in two threads that end with this process."""
    under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def take_in() -> None:
        free_at = 0.0
        while True:
            packet = os.read(source, 1 << 16)
            free_at = max(free_at, time.monotonic()) + 8 * len(packet) / bits_per_s
            under_way.put((free_at + late_s, packet))

    def put_out() -> None:
        while True:
            due_at, packet = under_way.get()
            time.sleep(max(0.0, due_at - time.monotonic()))
            os.write(sink, packet)

    for work in (take_in, put_out):
        threading.Thread(target=work, daemon=True).start()


def _end_of_line(address: str, peer: str) -> int:
    """A network interface of this namespace whose packets are read from, and written to, what is returned."""
    file = os.open("/dev/net/tun", os.O_RDWR)
    set_interface, tun_without_header = 0x400454CA, 0x1001
    fcntl.ioctl(file, set_interface, struct.pack("16sH22x", b"line", tun_without_header))
    for command in (
        "ip link set lo up",
        f"ip address add {address} peer {peer} dev line",
        f"ip link set line up mtu {_MTU} txqueuelen 1000",
    ):
        subprocess.run(command.split(), check=True)
    return file


def _keep_the_far_end(to: int) -> None:
    """Give the end in this namespace to who laid the line, and be there until it ends."""
    with socket.socket(fileno=to) as where:
        socket.send_fds(where, [b"."], [_end_of_line(FAR, NEAR)])
    sys.stdin.buffer.read()


if __name__ == "__main__":
    _keep_the_far_end(int(sys.argv[1]))
