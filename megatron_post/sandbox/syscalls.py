"""The seccomp filter, which refuses system calls of programs in bubblewrap.

Namespaces hide the host from a program, but the kernel is still shared. The filter refuses system calls that
no honest program of one file needs. They have been used to break out of sandboxes, or they take memory that
counts for no process. The filter is a classic BPF program, which the kernel runs before each system call.
"""

import platform
import struct
from dataclasses import dataclass

from megatron_post.installation import install_system_package

# Name, number on x86_64 and number on aarch64 from the kernel's unistd.h. "-" means that it does not exist.
_REFUSED = """
acct 163 89                 add_key 248 217             adjtimex 159 171            bpf 321 280
chroot 161 51               clock_adjtime 305 266       clock_settime 227 112       delete_module 176 106
fanotify_init 300 262       finit_module 313 273        fsconfig 431 431            fsmount 432 432
fsopen 430 430              fspick 433 433              init_module 175 105         io_uring_enter 426 426
io_uring_register 427 427   io_uring_setup 425 425      ioperm 173 -                iopl 172 -
kcmp 312 272                kexec_file_load 320 294     kexec_load 246 104          keyctl 250 219
lookup_dcookie 212 18       memfd_create 319 279        memfd_secret 447 447        migrate_pages 256 238
modify_ldt 154 -            mount 165 40                mount_setattr 442 442       move_mount 429 429
move_pages 279 239          mq_open 240 180             msgget 68 186               name_to_handle_at 303 264
nfsservctl 180 42           open_by_handle_at 304 265   open_tree 428 428           perf_event_open 298 241
personality 135 92          pidfd_getfd 438 438         pivot_root 155 41           process_madvise 440 440
process_vm_readv 310 270    process_vm_writev 311 271   ptrace 101 117              quotactl 179 60
quotactl_fd 443 443         reboot 169 142              request_key 249 218         semget 64 190
setdomainname 171 162       sethostname 170 161         setns 308 268               settimeofday 164 170
shmget 29 194               swapoff 168 225             swapon 167 224              syslog 103 116
umount2 166 39              unshare 272 97              userfaultfd 323 282         uselib 134 -
ustat 136 -                 vhangup 153 58              vmsplice 278 75
"""
# Calls whose arguments are checked, and clone3. A filter cannot see the flags of clone3, so it fails with
# ENOSYS, and C libraries then use clone.
_CLOSELY = """
clone 56 220  clone3 435 435  ioctl 16 29  prlimit64 302 261  setrlimit 160 164  setsockopt 54 208
socket 41 198
"""
_NEWEST = 450  # set_mempolicy_home_node. Later calls fail with ENOSYS, which libraries handle
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h

_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
# AF_UNIX. AF_VSOCK would reach a virtual machine's host, and AF_INET takes megabytes for each connection.
_FAMILIES = (1,)
_BUFFERS = (7, 32)  # SO_SNDBUF, SO_SNDBUFFORCE. The memory of sockets counts for no process
_TERMINAL = (0x5412, 0x541C)  # TIOCSTI and TIOCLINUX, which type into a terminal
_CORE = 4  # RLIMIT_CORE. Only a limit of 1 keeps the host's program for core dumps from running

_LOAD, _EQUAL, _ABOVE, _BITS, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06  # opcodes, linux/bpf_common.h
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
# SECCOMP_RET_ERRNO with an error number. With 0 the call does nothing and succeeds.
_IGNORED, _EPERM, _ENOSYS, _EAFNOSUPPORT = (0x00050000 | number for number in (0, 1, 38, 97))
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data, little-endian

Instruction = tuple[int, int, int, int]  # opcode, jumps where true and where false, operand


@dataclass(frozen=True)
class Call:
    name: str
    numbers: dict[str, int]  # by architecture


def refused() -> list[Call]:
    """System calls that fail with EPERM, whatever their arguments are."""
    return _calls(_REFUSED)


def closely() -> dict[str, Call]:
    """System calls that the filter allows or refuses by their arguments, by name."""
    return {call.name: call for call in _calls(_CLOSELY)}


def filter_program(architecture: str | None = None) -> bytes:
    """The filter in the form that bubblewrap's `--seccomp` reads.

    Raises `ValueError` for an architecture other than x86_64 and aarch64.
    """
    machine = architecture or platform.machine()
    if machine not in _AUDIT:
        raise ValueError(
            f"bubblewrap's filter of system calls is written for {' and '.join(_AUDIT)}, and this machine is "
            f"{machine}; use a container: {install_system_package('apptainer')} and set sandbox.kind=command"
        )
    number = {name: call.numbers[machine] for name, call in closely().items()}
    program = [
        _load(_ARCHITECTURE), (_EQUAL, 1, 0, _AUDIT[machine]), _return(_KILL),
        _load(_NUMBER), (_ABOVE, 0, 1, _NEWEST), _return(_ENOSYS),
    ]  # fmt: skip
    for call in refused():
        if machine in call.numbers:
            program += _if(call.numbers[machine], [_return(_EPERM)])
    program += _if(number["clone3"], [_return(_ENOSYS)])
    program += _if(
        number["clone"], [_argument(0), (_BITS, 0, 1, _NAMESPACES), _return(_EPERM), _return(_ALLOW)]
    )
    program += _if(number["socket"], [_argument(0), *_one_of(_FAMILIES, _ALLOW), _return(_EAFNOSUPPORT)])
    # A request for a larger buffer succeeds but has no effect.
    program += _if(number["setsockopt"], [_argument(2), *_one_of(_BUFFERS, _IGNORED), _return(_ALLOW)])
    program += _if(number["ioctl"], [_argument(1), *_one_of(_TERMINAL, _EPERM), _return(_ALLOW)])
    program += _if(number["setrlimit"], [_argument(0), *_one_of((_CORE,), _EPERM), _return(_ALLOW)])
    # prlimit64 only reads a limit if its third argument is a null pointer, which is checked in two halves.
    changes = [_argument(2), (_EQUAL, 0, 2, 0), _argument(2, high=True), (_EQUAL, 1, 0, 0), _return(_EPERM)]
    program += _if(number["prlimit64"], [_argument(1), (_EQUAL, 0, 5, _CORE), *changes, _return(_ALLOW)])
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in [*program, _return(_ALLOW)])


def _calls(table: str) -> list[Call]:
    words = table.split()
    rows = (words[i : i + 3] for i in range(0, len(words), 3))
    return [
        Call(name, {key: int(text) for key, text in zip(_AUDIT, found, strict=True) if text != "-"})
        for name, *found in rows
    ]


def _if(number: int, block: list[Instruction]) -> list[Instruction]:
    """Run `block` for one system call. The block must end with a return."""
    return [(_EQUAL, 0, len(block), number), *block]


def _one_of(values: tuple[int, ...], action: int) -> list[Instruction]:
    return [step for value in values for step in ((_EQUAL, 0, 1, value), _return(action))]


def _load(offset: int) -> Instruction:
    return (_LOAD, 0, 0, offset)


def _argument(index: int, *, high: bool = False) -> Instruction:
    """Load the lower half of an argument, or the upper half."""
    return _load(_ARGUMENTS + 8 * index + 4 * high)


def _return(action: int) -> Instruction:
    return (_RETURN, 0, 0, action)
