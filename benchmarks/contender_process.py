"""The process of one contender: does what it is told on standard input, one word a line, and answers in JSON lines.

    (imports)  -> {}      build -> seconds, peak memory      step -> seconds, loss, rusage      memory -> peak memory
    close      ends it    any other word is a method of the server

Replies go to the standard output that the process was given; whatever libraries print goes to stderr. {"error": text}
ends it; {"missing": sentence} says that the contender cannot take part here, and why.
"""

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Missing(Exception):
    """What this contender needs is not there; a sentence."""


def status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def drive_bytes() -> dict[str, int]:
    """What this process has had read from drives, and written to them."""
    pairs = [line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines()]
    return {key: int(value) for key, value in pairs if key in ("read_bytes", "write_bytes")}


def busy_seconds() -> float:
    """Processor time that everyone on this machine has used since it started."""
    user, nice, system, _, _, interrupt, soft_interrupt, *_ = map(
        int, Path("/proc/stat").read_text(encoding="utf-8").split()[1:11]
    )
    return (user + nice + system + interrupt + soft_interrupt) / os.sysconf("SC_CLK_TCK")


def forget_peak() -> None:
    """Lets VmHWM start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measured(step: Callable[[], float]) -> dict[str, Any]:
    """Runs one step, which returns its loss; what it took."""
    usage, busy, moved = resource.getrusage(resource.RUSAGE_SELF), busy_seconds(), drive_bytes()
    begin = time.perf_counter()
    loss = step()
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - usage.ru_utime, after.ru_stime - usage.ru_stime
    return {
        "seconds": seconds,
        "loss": loss,
        "user_seconds": user,
        "system_seconds": system,
        "others_share": max(0.0, busy_seconds() - busy - user - system) / seconds / (os.cpu_count() or 1),
        "page_faults": after.ru_minflt - usage.ru_minflt,
        "preemptions": after.ru_nivcsw - usage.ru_nivcsw,
        **{key: value - moved[key] for key, value in drive_bytes().items()},
    }


def serve(make_server: Callable[[dict[str, Any], int], Any]) -> None:
    """Answers until it is told to close. What was imported before is the base that memory is counted from."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(answer: dict[str, Any]) -> None:
        channel.write(json.dumps(answer) + "\n")
        channel.flush()

    server = make_server(json.loads(sys.argv[1]), status_bytes("VmRSS"))
    forget_peak()
    reply({})
    for line in sys.stdin:
        request = line.strip()
        if request == "close":
            break
        try:
            reply(getattr(server, request)())
        except Missing as missing:
            reply({"missing": str(missing)})
            break
        except Exception:  # noqa: BLE001 - the parent raises it
            reply({"error": traceback.format_exc()})
            break
    server.close()
