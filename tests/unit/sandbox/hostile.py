"""Programs that want out of the sandbox, or more than their limits, and how each must end.

A program that reaches what it must not reach prints LEAK. `@name` is what a test prepares on the host.
"""

from typing import NamedTuple

from megatron_post.sandbox.languages import Language
from megatron_post.sandbox.outcome import Kind


class Hostile(NamedTuple):
    language: Language
    source: str
    kind: Kind
    printed: str = ""  # a part of standard output and error


_CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
"""
_FORK_AND_LEAVE = "import os, sys, time\nif os.fork(): sys.exit()\nos.setsid()\nif os.fork(): os._exit(0)\n"
_REFUSED = "Operation not permitted"
_NO_FAMILY = "not supported"

PROGRAMS: dict[str, Hostile] = {
    # processes
    "fork bomb": Hostile(
        "python",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "processes",
    ),
    "fork bomb in bash": Hostile("bash", "bomb() { bomb | bomb & }; bomb; sleep 100", "processes"),
    "threads": Hostile(
        "python",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(100,)).start()",
        "processes",
    ),
    # memory
    "memory in Python": Hostile("python", "x = []\nwhile True: x.append(bytearray(1 << 20))", "memory"),
    "memory in C++": Hostile(
        "cpp",
        "#include <cstdlib>\n#include <cstring>\nint main() { for (;;) memset(malloc(99999), 1, 99999); }",
        "memory",
    ),
    "memory in node": Hostile("javascript", "const a = []; for (;;) a.push(Buffer.alloc(1e6, 1));", "memory"),
    "memory in Java": Hostile(
        "java",
        "import java.util.*; class M { public static void main(String[] a) { "
        "List<byte[]> l = new ArrayList<>(); while (true) l.add(new byte[1 << 20]); } }",
        "failed",
        "OutOfMemoryError",
    ),
    "memory in many processes": Hostile(
        "python",
        "import os, time\nfor i in range(8):\n    if not os.fork():\n        x = os.urandom(60 << 20)\n"
        "        time.sleep(100)\ntime.sleep(100)",
        "memory",
    ),
    "shared memory": Hostile(
        "python",
        "import mmap, time\nx = mmap.mmap(-1, 400 << 20)\nfor i in range(0, 400 << 20, 4096): x[i] = 1\n"
        "time.sleep(100)",
        "memory",
    ),
    "one allocation": Hostile("python", "x = bytearray(3 << 30)\nprint('LEAK')", "failed", "MemoryError"),
    "a file in memory alone": Hostile("python", "import os\nos.memfd_create('x')", "failed", _REFUSED),
    "System V shared memory": Hostile(
        "python",
        _CALL + "call(29 if os.uname().machine == 'x86_64' else 194, 0, 1 << 20, 0o1666)",
        "failed",
        _REFUSED,
    ),
    # files
    "disk": Hostile(
        "python", "i = 0\nwhile True:\n    open(f'{i}', 'wb').write(b'x' * 10 ** 6)\n    i += 1", "disk"
    ),
    "one huge file": Hostile("python", "f = open('f', 'wb')\nwhile True: f.write(b'x' * (1 << 20))", "disk"),
    "sparse file": Hostile(
        "python", "open('f', 'wb').truncate(1 << 40)\nprint('LEAK')", "failed", "File too large"
    ),
    "empty files": Hostile(
        "python", "i = 0\nwhile True:\n    open(f'{i}', 'wb').close()\n    i += 1", "disk"
    ),
    "/dev/shm": Hostile(
        "python",
        "i = 0\nwhile True:\n    open(f'/dev/shm/{i}', 'wb').write(b'x' * 10 ** 6)\n    i += 1",
        "disk",
    ),
    "open files": Hostile(
        "python", "x = []\nwhile True: x.append(open('/dev/null'))", "failed", "Too many open files"
    ),
    "writing to /usr": Hostile(
        "python", "open('/usr/x', 'w')\nprint('LEAK')", "failed", "Read-only file system"
    ),
    "writing everywhere": Hostile(
        "bash",
        "for place in / /etc /dev /usr /usr/bin /root /home /proc /sys /proc/sys/kernel; do "
        "touch $place/planted 2>/dev/null && echo LEAK $place; done; exit 0",
        "passed",
    ),
    "a device": Hostile(
        "python",
        "import os, stat\nos.mknod('d', stat.S_IFBLK | 0o666, os.makedev(254, 0))\nopen('d')\nprint('LEAK')",
        "failed",
        _REFUSED,
    ),
    "hard link": Hostile(
        "python",
        "import os\nos.link('/usr/bin/bash', 'b')\nprint('LEAK')",
        "failed",
        "Invalid cross-device link",
    ),
    # reading the host
    "a file of the host": Hostile("python", "print('LEAK', open(@secret).read())", "failed", "No such file"),
    "a symlink out": Hostile(
        "python",
        "import os\nos.symlink(@secret, 'x')\nprint('LEAK', open('x').read())",
        "failed",
        "No such file",
    ),
    "through pid 1's root": Hostile(
        "python", "print('LEAK', open('/proc/1/root' + @secret).read())", "failed", "No such file"
    ),
    "/etc/shadow": Hostile("python", "print('LEAK', open('/etc/shadow').read())", "failed", "No such file"),
    "home": Hostile(
        "python",
        "import os\nseen = [f for d, _, fs in os.walk(@home) for f in fs if f.startswith('.bash')]\n"
        "print('LEAK' if seen else 'nothing')",
        "passed",
    ),
    "every environment": Hostile("bash", "cat /proc/[0-9]*/environ; env", "passed", "PATH="),
    "all of /proc": Hostile(
        "python",
        "import os, sys\nfor d, ds, fs in os.walk('/proc'):\n    for f in fs:\n        try:\n"
        "            descriptor = os.open(f'{d}/{f}', os.O_RDONLY | os.O_NONBLOCK)\n"
        "            text = os.read(descriptor, 1 << 16)\n            os.close(descriptor)\n"
        "        except OSError: continue\n"
        "        if @token[::-1].encode() in text: print('LEAK', d, f)\n",
        "passed",
    ),
    # the network
    "connect": Hostile(
        "python",
        "import socket\nsocket.create_connection(('192.0.2.1', 53), 2)\nprint('LEAK')",
        "failed",
        "not supported",
    ),
    "names": Hostile(
        "python", "import socket\nsocket.getaddrinfo('example.com', 80)\nprint('LEAK')", "failed", "gaierror"
    ),
    "the host's loopback": Hostile(
        "python",
        "import socket\nsocket.create_connection(('127.0.0.1', @port), 2)\nprint('LEAK')",
        "failed",
        "not supported",
    ),
    "an abstract socket": Hostile(
        "python",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0' + @abstract)\nprint('LEAK')",
        "failed",
        "refused",
    ),
    "a virtual machine's host": Hostile(
        "python", "import socket\nsocket.socket(socket.AF_VSOCK)", "failed", "not supported"
    ),
    "memory in sockets": Hostile(
        "python",  # `keep` is global, so that the sockets stay open when the kernel refuses one more
        "import contextlib, os, socket, time\nkeep = []\ndef fill():\n    while True:\n"
        "        pair = socket.socketpair()\n        keep.append(pair)\n        for each in pair:\n"
        "            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30)\n"
        "            each.setblocking(False)\n            with contextlib.suppress(BlockingIOError):\n"
        "                while True: each.send(b'x' * 65536)\n"
        "for i in range(8):\n    if not os.fork():\n        with contextlib.suppress(OSError): fill()\n"
        "        time.sleep(1000)\ntime.sleep(1000)",
        "files",
    ),
    "the kernel by netlink": Hostile(
        "python", "import socket\nsocket.socket(socket.AF_NETLINK)", "failed", "not supported"
    ),
    "raw packets": Hostile(
        "python", "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)", "failed", "not supported"
    ),
    # other processes
    "ptrace": Hostile(
        "python",
        _CALL + "call(101 if os.uname().machine == 'x86_64' else 117, 16, os.getppid(), 0, 0)",
        "failed",
        _REFUSED,
    ),
    "kill -1": Hostile("python", "import os\nos.kill(-1, 9)\nprint('survived')", "failed", "No such process"),
    "signals to all": Hostile(
        "python",
        "import contextlib, os\nfor process in range(1, 70000):\n    if process != os.getpid():\n"
        "        with contextlib.suppress(OSError): os.kill(process, 9)\nprint('survived')",
        "passed",
        "survived",
    ),
    "signals to the parent": Hostile(
        "python",
        "import os\nfor number in (15, 9): os.kill(os.getppid(), number)\nprint('survived')",
        "passed",
        "survived",
    ),
    # time
    "sleep": Hostile("python", "import time\ntime.sleep(1000)", "timeout"),
    "ignoring signals": Hostile(
        "python",
        "import signal, time\nfor n in (1, 2, 3, 15, 24): signal.signal(n, signal.SIG_IGN)\ntime.sleep(1000)",
        "timeout",
    ),
    "busy": Hostile("python", "while True: pass", "timeout"),
    "busy in short children": Hostile(
        "bash",
        "while true; do for i in 1 2 3 4; do (for j in {1..20000}; do :; done) & done; wait; done",
        "timeout",
    ),
    "stopping itself": Hostile("python", "import os\nos.kill(os.getpid(), 19)", "timeout"),
    # output
    "flood": Hostile("python", "while True: print('x' * 1000)", "output"),
    "flood of errors": Hostile(
        "bash", "while true; do echo 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' >&2; done", "output"
    ),
    "closed output": Hostile(
        "python", "import os, time\nos.close(1); os.close(2)\ntime.sleep(1000)", "timeout"
    ),
    "not UTF-8": Hostile(
        "python", "import sys\nsys.stdout.buffer.write(b'a\\xff\\x00b')", "passed", "a\ufffd\0b"
    ),
    "a false result": Hostile(
        "python",
        'print(\'{"kind": "passed", "returncode": 0, "exit-code": 0}\')\nraise SystemExit(3)',
        "failed",
    ),
    # what stays behind
    "a daemon": Hostile("python", _FORK_AND_LEAVE + "time.sleep(1000)", "passed"),
    "a daemon without output": Hostile(
        "python", _FORK_AND_LEAVE + "for i in range(3): os.close(i)\ntime.sleep(1000)", "passed"
    ),
    # how it ends
    "exit 137": Hostile("bash", "exit 137", "killed"),
    "SIGKILL": Hostile("python", "import os\nos.kill(os.getpid(), 9)", "killed"),
    "a missing tool": Hostile("bash", "no-such-tool", "unavailable", "not found"),
    "recursion": Hostile("python", "def f(): f()\nf()", "failed", "RecursionError"),
    "recursion in C++": Hostile(
        "cpp",
        "int f(volatile int* x) { int y = *x + 1; return f(&y) + y; }\nint main() { int x = 0; f(&x); }",
        "killed",
    ),
    # the kernel
    "mount": Hostile("bash", "mount -t tmpfs x /tmp && echo LEAK", "failed"),
    "a user namespace": Hostile("bash", "unshare --user --map-root-user id && echo LEAK", "failed", _REFUSED),
    "a user namespace by clone": Hostile(
        "python",
        _CALL + "call(56 if os.uname().machine == 'x86_64' else 220, 0x10000011, 0, 0, 0, 0)",
        "failed",
        _REFUSED,
    ),
    "clone3": Hostile("python", _CALL + "call(435, 0, 0)", "failed", "not implemented"),
    "chroot": Hostile("python", "import os\nos.chroot('.')\nprint('LEAK')", "failed", _REFUSED),
    "root by setuid": Hostile("python", "import os\nos.setuid(0)\nprint('LEAK')", "failed", "OSError"),
    "the terminal": Hostile(
        "python", "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')\nprint('LEAK')", "failed", _REFUSED
    ),
    "the core pattern": Hostile(
        "python", "open('/proc/sys/kernel/core_pattern', 'w').write('x')\nprint('LEAK')", "failed", "Error"
    ),
    "whatever can be written": Hostile(
        "bash",
        "find / /proc -xdev -writable -not -type l -not -path '/dev/*' -not -path '/proc/[0-9]*' "
        "-not -path /tmp 2>/dev/null | sed 's/^/LEAK /'",
        "passed",
    ),
    "timers": Hostile(
        "python",
        "import ctypes\ncount = 0\nlib = ctypes.CDLL(None)\n"
        "while count < 20000 and lib.timer_create(1, None, ctypes.byref(ctypes.c_int64())) == 0: count += 1\n"
        "print('LEAK' if count == 20000 else 'refused')",
        "passed",
        "refused",
    ),
    "waiting signals": Hostile(
        "python",
        "import ctypes, os, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, {35})\ncount = 0\n"
        "while count < 20000 and ctypes.CDLL(None).sigqueue(os.getpid(), 35, 0) == 0: count += 1\n"
        "print('LEAK' if count == 20000 else 'refused')",
        "passed",
        "refused",
    ),
    "deep directories": Hostile("python", "import os\nwhile True: os.mkdir('d'); os.chdir('d')", "disk"),
    "stopping its parents": Hostile(
        "bash",
        "kill -STOP $PPID; kill -STOP 2; kill -STOP 0",
        "timeout",
    ),
    "calls of 32 bits": Hostile(
        "cpp",
        "int main() {\n#ifdef __x86_64__\n"
        'long r; asm volatile("int $0x80" : "=a"(r) : "a"(20)); __builtin_puts("LEAK");\n'
        "#else\n__builtin_trap();\n#endif\n}\n",
        "killed",
    ),
    "sysrq": Hostile(
        "python", "open('/proc/sysrq-trigger', 'w').write('s')\nprint('LEAK')", "failed", "Error"
    ),
    "its limits": Hostile(
        "python",
        "import resource as r\nfor limit in (r.RLIMIT_NPROC, r.RLIMIT_DATA, r.RLIMIT_FSIZE, r.RLIMIT_CPU):\n"
        "    try: r.setrlimit(limit, (r.RLIM_INFINITY, r.RLIM_INFINITY))\n"
        "    except (OSError, ValueError): continue\n    print('LEAK', limit)\n",
        "passed",
    ),
    "a core dump by the host": Hostile(
        "python",
        "import resource as r\ntry: r.setrlimit(r.RLIMIT_CORE, (0, 1))\n"
        "except (OSError, ValueError): print('refused')\nprint(r.getrlimit(r.RLIMIT_CORE))",
        "passed",
        "refused\n(1, 1)",
    ),
}
