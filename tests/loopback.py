"""Ray on loopback alone, for whoever loads this before Ray: on this machine's other addresses nothing listens."""

import os

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Every address is then 127.0.0.1; also for the environment of other processes."""
os.environ |= LOOPBACK
