# SPDX-License-Identifier: Apache-2.0
"""cri_server.kernelstats: what runsc prints becomes figures."""

import msgspec
import pytest

from cri_server import kernelstats, usage

SAID = (
    b'{"type":"stats","id":"c1","data":{"cpu":{"usage":{"total":111032606}},"memory":{"usage":'
    b'{"limit":0,"usage":4235264,"failcnt":0},"swap":{"limit":0}},"pids":{"current":5}}}\n'
)


def test_cpu_and_memory_are_read() -> None:
    assert kernelstats.parsed(SAID) == usage.Usage(
        cpu=111032606, memory=4235264, working_set=4235264
    )


@pytest.mark.parametrize("said", [b"", b"loading sandbox: no", b'{"data": {}}', b'{"data": 1}'])
def test_what_is_no_event_is_an_error(said: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        kernelstats.parsed(said)
