"""The system calls that a confined child may still make; Linux refuses all others (seccomp).

Landlock knows files and little else: not modes, times and extended attributes of files, not UNIX
sockets by path, not the kernel's keyrings. A list of what is allowed closes those and whatever a
later kernel adds.
"""

import ctypes
import errno
import platform
import struct

_X86, _ARM = 0xC000003E, 0xC00000B7  # AUDIT_ARCH of linux/audit.h
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000  # SECCOMP_RET of linux/seccomp.h
_LOAD, _EQUAL, _AND, _RETURN = 0x20, 0x15, 0x54, 0x06  # instructions of linux/bpf_common.h
_NUMBER, _ARCHITECTURE, _FIRST, _SECOND, _THIRD = 0, 4, 16, 24, 32
"""Places in struct seccomp_data: of the arguments the lower halves."""
_THREAD, _NAMESPACES = 0x00010100, 0x7E020000  # clone: CLONE_THREAD and CLONE_VM; all CLONE_NEW

# Numbers on x86-64 and arm64; none where an architecture does not have the call.
_CALLS: dict[str, tuple[int | None, int | None]] = {
    # open files
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "lseek": (8, 62),
    "close": (3, 57),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "fcntl": (72, 25),
    "ftruncate": (77, 46),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "unlink": (87, None),
    "rmdir": (84, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "poll": (7, None),
    "ppoll": (271, 73),
    "pipe2": (293, 59),
    # memory
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    "membarrier": (324, 283),
    # threads, signals to itself, and the end
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "set_tid_address": (218, 96),
    "rseq": (334, 293),
    "arch_prctl": (158, None),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "tgkill": (234, 131),
    "exit": (60, 93),
    "exit_group": (231, 94),
    # what it is and what time it is
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getrusage": (98, 165),
    "getrandom": (318, 278),
    "time": (201, None),
    "gettimeofday": (96, 169),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "getcpu": (309, 168),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
}
_CLONE, _PRLIMIT, _IOCTL = (56, 220), (302, 261), (16, 29)
_OPEN, _OPENAT = (2, None), (257, 56)
_TRUNCATE, _MODE = 0o1000, 3  # O_TRUNC and O_ACCMODE of fcntl.h


def allow_few_calls(libc: ctypes.CDLL) -> bool:
    """Allow this process only the system calls of a computation, irrevocably.

    A new thread is allowed and a new process is not; limits can be read and not set. A refused call
    fails with ENOSYS, so that libraries take another way, and a call of another architecture (32
    bits) kills the process.

    Returns:
        Whether the kernel took the list; false on other processors than x86-64 and arm64, and where
        a kernel has no seccomp.
    """
    architectures = {"x86_64": (_X86, 0), "aarch64": (_ARM, 1)}
    if platform.machine() not in architectures:
        return False
    architecture, column = architectures[platform.machine()]
    program = _program(architecture, column)
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog
    header = struct.pack("=HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    no_new_privileges, filtering = 38, 22  # PR_SET of linux/prctl.h
    libc.prctl(no_new_privileges, 1, 0, 0, 0)
    return bool(libc.prctl(filtering, 2, ctypes.c_char_p(header), 0, 0) == 0)


def _program(architecture: int, column: int) -> bytes:
    """Build the kernel's program, of 8 bytes for each `(code, jump if true, if false, value)`."""
    answer = {"no": _ERRNO | errno.ENOSYS, "yes": _ALLOW, "no terminal": _ERRNO | errno.ENOTTY}
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 0, 1, _IOCTL[column]),
        (_RETURN, 0, 0, answer["no terminal"]),
        (_EQUAL, 0, 5, _CLONE[column]),
        (_LOAD, 0, 0, _FIRST),
        (_AND, 0, 0, _THREAD | _NAMESPACES),
        (_EQUAL, 0, 1, _THREAD),
        (_RETURN, 0, 0, answer["yes"]),
        (_RETURN, 0, 0, answer["no"]),
        # prlimit64 of itself; what it would set is above the hard limits or lowers them
        (_EQUAL, 0, 4, _PRLIMIT[column]),
        (_LOAD, 0, 0, _FIRST),
        (_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, answer["yes"]),
        (_RETURN, 0, 0, answer["no"]),
    ]
    # Landlock decides which files can be opened, but before Linux 6.2 it lets a process that may
    # read a file truncate it on opening (O_TRUNC).
    for call, flags in ((_OPEN, _SECOND), (_OPENAT, _THIRD)):
        if (number := call[column]) is not None:
            steps += [
                (_EQUAL, 0, 6, number),
                (_LOAD, 0, 0, flags),
                (_AND, 0, 0, _TRUNCATE | _MODE),
                (_EQUAL, 2, 0, _TRUNCATE),  # for reading
                (_EQUAL, 1, 0, _TRUNCATE | _MODE),  # for neither reading nor writing
                (_RETURN, 0, 0, answer["yes"]),
                (_RETURN, 0, 0, answer["no"]),
            ]
    for numbers in _CALLS.values():
        if (number := numbers[column]) is not None:
            steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, answer["yes"])]
    steps.append((_RETURN, 0, 0, answer["no"]))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
