# SPDX-License-Identifier: Apache-2.0
"""What ADD answers: which addresses the pod has, and the same in another version of CNI. Pure.

    {"cniVersion": "1.0.0",
     "interfaces": [{"name": "cri0"}, {"name": "eth0", "sandbox": "/run/netns/..."}],
     "ips": [{"interface": 1, "address": "10.86.0.2/16", "gateway": "10.86.0.1"}],
     "routes": [{"dst": "0.0.0.0/0"}], "dns": {}}

Before 1.0.0 each of `ips` also has "version": "4" or "6"; that is the one difference to convert.
"""

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Literal

from cri_server.network import conf

Preference = Literal["cni", "ipv4", "ipv6"]
Result = Mapping[str, object]


def convert(result: Result, version: str) -> dict[str, object]:
    """Return the result as `version` (one of `conf.VERSIONS`) writes it. Raises conf.Invalid."""
    converted = {**result, "cniVersion": version}
    if "ips" in result:
        old = version < "1.0.0"
        converted["ips"] = [_convert_ip(ip, old=old) for ip in _ips(result)]
    return converted


def _convert_ip(ip: Mapping[str, object], *, old: bool) -> dict[str, object]:
    plain = {key: value for key, value in ip.items() if key != "version"}
    return {"version": str(_address(ip).version), **plain} if old else plain


def addresses(result: Result, ifname: str, preference: Preference = "cni") -> tuple[str, ...]:
    """Return the addresses on the pod's interface, without masks, the preferred family first.

    An address that names no interface is on it. Raises conf.Invalid when there is none, or the
    answer is garbage.
    """
    own = _interfaces(result, ifname)
    found = [_address(ip) for ip in _ips(result) if _index(ip) in own]
    if not found:
        raise conf.Invalid(f"the result has no IP address on {ifname}")
    if preference != "cni":
        found.sort(key=lambda address: f"ipv{address.version}" != preference)
    return tuple(dict.fromkeys(str(address.ip) for address in found))


def _interfaces(result: Result, ifname: str) -> set[int | None]:
    """Return the numbers of the interfaces called `ifname` in the sandbox, and None: not said."""
    interfaces = _objects(result, "interfaces")
    inside = any(i.get("sandbox") for i in interfaces)  # some plugins never say which are
    return {None} | {
        number
        for number, interface in enumerate(interfaces)
        if interface.get("name") == ifname and (interface.get("sandbox") or not inside)
    }


def _index(ip: Mapping[str, object]) -> int | None:
    index = ip.get("interface")
    return index if isinstance(index, int) or index is None else -1


def _ips(result: Result) -> Sequence[Mapping[str, object]]:
    return _objects(result, "ips")


def _objects(result: Result, key: str) -> Sequence[Mapping[str, object]]:
    found = result.get(key) or []
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise conf.Invalid(f"{key!r} of the result is not a list of objects")
    return found


def _address(ip: Mapping[str, object]) -> ipaddress.IPv4Interface | ipaddress.IPv6Interface:
    text = ip.get("address")
    try:
        return ipaddress.ip_interface(text if isinstance(text, str) else "")
    except ValueError:
        raise conf.Invalid(f"{str(text)[:80]!r} in the result is not an address") from None
