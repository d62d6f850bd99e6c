# SPDX-License-Identifier: Apache-2.0
"""Usage from cgroup files: both modes, and what is missing stays unknown."""

from pathlib import Path

from cri_server import usage

V2 = {
    "cpu.stat": "usage_usec 5\nuser_usec 3\n",
    "memory.current": "1000\n",
    "memory.stat": "anon 600\nfile 300\ninactive_file 400\npgfault 7\npgmajfault 1\n",
    "memory.max": "max\n",
    "memory.swap.current": "10\n",
    "memory.swap.max": "100\n",
    "cpu.pressure": "some avg10=1.50 avg60=0.20 avg300=0.00 total=9\n",
}
V1 = {
    "cpuacct.usage": "5000\n",
    "memory.usage_in_bytes": "1000\n",
    "memory.limit_in_bytes": "9223372036854771712\n",
    "memory.stat": "cache 1\ntotal_rss 600\ntotal_cache 300\ntotal_inactive_file 1400\n",
}


def write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (directory / name).write_text(text)


def test_v2(tmp_path: Path) -> None:
    write(tmp_path, V2)
    found = usage.read({"": str(tmp_path)})
    assert found is not None
    assert found.pressure is not None
    assert (found.cpu, found.memory, found.working_set, found.rss) == (5000, 1000, 600, 600)
    assert (found.limit, found.swap, found.swap_limit) == (None, 10, 100)
    assert (found.faults, found.major_faults, found.cache) == (7, 1, 300)
    assert found.pressure["cpu"].some == usage.Pressure(
        total=9000, avg10=1.5, avg60=0.2, avg300=0.0
    )


def test_v1(tmp_path: Path) -> None:
    write(tmp_path, V1)
    found = usage.read(dict.fromkeys(("cpuacct", "memory"), str(tmp_path)))
    assert found is not None
    assert found.pressure is None, "v1 alone counts no pressure"
    assert (found.cpu, found.memory, found.working_set, found.rss) == (5000, 1000, 0, 600)
    assert found.limit is None, "a number near 2^63 means no limit"
    assert found.swap is None, "no swap accounting"


def test_hybrid_takes_the_pressure_from_v2(tmp_path: Path) -> None:
    (tmp_path / "unified").mkdir()
    write(tmp_path, V1)
    write(tmp_path / "unified", V2)

    v1 = dict.fromkeys(("cpuacct", "memory"), str(tmp_path))
    found = usage.read({**v1, "unified": str(tmp_path / "unified")})

    assert found is not None
    assert found.pressure is not None
    assert found.pressure["cpu"].some is not None
    assert (found.cpu, found.pressure["cpu"].some.total) == (5000, 9000)


def test_swap_of_v1_is_what_memsw_has_more_than_memory(tmp_path: Path) -> None:
    more = {"memory.memsw.usage_in_bytes": "1300", "memory.memsw.limit_in_bytes": "5000"}
    write(tmp_path, {**V1, **more, "memory.limit_in_bytes": "2000"})
    found = usage.read(dict.fromkeys(("cpuacct", "memory"), str(tmp_path)))

    assert found is not None
    assert (found.swap, found.swap_limit, found.limit) == (300, 3000, 2000)


def test_a_cgroup_that_is_gone_has_no_usage(tmp_path: Path) -> None:
    assert usage.read({"": str(tmp_path / "gone")}) is None
    assert usage.read({"memory": str(tmp_path / "gone")}) is None
