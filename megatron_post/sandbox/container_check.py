"""Checks with a first program whether a site's container command isolates programs from the host."""

import os
from pathlib import Path

from megatron_post.sandbox.container import CANARY

# The script prints a line for each fault. Its arguments are this process's PID and network namespaces, a
# directory in the host's temporary directory, and the home directory with its inode.
_SCRIPT = f"""
[ "$(readlink /proc/self/ns/pid)" = "$1" ] && echo processes
[ "$(readlink /proc/self/ns/net)" = "$2" ] && echo network
while read -r name more; do [ "$name" = Iface ] || echo network; done </proc/net/route
while read -r line; do case $line in *lo) ;; *) echo network ;; esac; done </proc/net/ipv6_route
[ -n "${CANARY}" ] && echo environment
[ -e "$3" ] && echo files
set -- "$4" "$5" $(ls -di "$4")
[ "$3" = "$2" ] && echo files
mkdir -p made/by && touch made/by/me || echo directory
exit 0
"""
_FAULTS = {
    "processes": "sees the processes of the host: give it its own namespace (apptainer: --containall)",
    "network": "has a network (docker: --network=none; apptainer: --net --network=none)",
    "environment": "has the variables of this process (apptainer: --containall or --cleanenv)",
    "files": "sees files of the host (apptainer: --containall)",
    "directory": "cannot write to its working directory, which must be {directory}",
}


def command(directory: str) -> list[str]:
    """The command of the first program. directory: a temporary directory that it must not see."""
    home = Path.home()
    inode = str(home.stat().st_ino) if home.is_dir() else ""
    namespaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "net")]
    return ["sh", "-c", _SCRIPT, "sh", *namespaces, directory, str(home), inode]


def faults(printed: str) -> list[str]:
    """The faults in the output of the first program, as texts for a message."""
    return [_FAULTS[name] for name in dict.fromkeys(printed.split()) if name in _FAULTS]
