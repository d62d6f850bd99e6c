# SPDX-License-Identifier: Apache-2.0
"""Stop signals: CRI's numbering, names in images, and the host's numbers.

CRI numbers its Signal enum alphabetically; later versions rename the members, so only numbers are
compared.
"""

import signal

from cri_server import errors
from cri_server.pb import api_pb2 as api
from cri_server.spec import types

_CRI = {int(v): n.removeprefix("SIGNAL_") for n, v in api.Signal.items() if v}
_RTMIN, _RTMAX = 34, 64  # glibc's; the kernel's 32 and 33 belong to the C library


def _host_numbers() -> dict[str, int]:
    plain = {s.name: int(s) for s in signal.Signals if not s.name.startswith("SIGRT")}
    low = {f"SIGRTMIN+{n}": _RTMIN + n for n in range(16)}
    high = {f"SIGRTMAX-{n}": _RTMAX - n for n in range(15)}
    same = {"SIGRTMIN": _RTMIN, "SIGRTMAX": _RTMAX, "SIGIOT": int(signal.SIGABRT)}
    return plain | low | high | same | {"SIGCLD": int(signal.SIGCHLD), "SIGPOLL": int(signal.SIGIO)}


_NUMBERS = _host_numbers()


def stop_signal(config: api.ContainerConfig, image: types.ImageConfig) -> int:
    """Return the host's number of the stop signal: the request's, the image's, else SIGTERM.

    Raises InvalidArgument for one that does not exist (behaviour.md §1.3).
    """
    if config.stop_signal:
        return _from_cri(int(config.stop_signal))
    if image.stop_signal:
        return parse(image.stop_signal)
    return int(signal.SIGTERM)


def _from_cri(number: int) -> int:
    name = _CRI.get(number)
    if name is None:
        raise errors.InvalidArgument(f"stop_signal: {number} is not a signal")
    return _NUMBERS[name.replace("PLUS", "+").replace("MINUS", "-")]


def parse(text: str) -> int:
    """Return the number of "SIGQUIT", "quit", "SIGRTMIN+3" or "3". Raises InvalidArgument."""
    name = text.strip().upper()
    if name.isascii() and name.isdigit() and len(name) <= 2 and 1 <= int(name) <= _RTMAX:
        return int(name)
    number = _NUMBERS.get(name if name.startswith("SIG") else f"SIG{name}")
    if number is None:
        raise errors.InvalidArgument(f"image StopSignal: {text[:40]!r} is not a signal")
    return number


def stop_signal_value(number: int) -> api.Signal.ValueType:
    """Return CRI's enum value of the host's signal `number`, for ContainerStatus.stop_signal."""
    return api.Signal.ValueType(_VALUES.get(number, 0))


# Where two names share a number (SIGIOT, SIGCLD, SIGPOLL) the usual one wins.
_RARE = ("SIGIOT", "SIGCLD", "SIGPOLL")
_VALUES = {_from_cri(v): v for v, n in _CRI.items() if n not in _RARE}
