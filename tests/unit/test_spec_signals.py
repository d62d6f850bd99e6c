# SPDX-License-Identifier: Apache-2.0
"""Stop signals."""

import pytest

from cri_server import errors, spec
from cri_server.pb import api_pb2 as api
from tests.lab import wishes


@pytest.mark.parametrize(
    ("asked", "image", "expected"),
    [
        (api.RUNTIME_DEFAULT, "", 15),
        (api.RUNTIME_DEFAULT, "SIGQUIT", 3),
        (api.RUNTIME_DEFAULT, "quit", 3),
        (api.RUNTIME_DEFAULT, "9", 9),
        (api.RUNTIME_DEFAULT, "SIGRTMIN+3", 37),
        (api.RUNTIME_DEFAULT, "RTMAX-14", 50),
        (api.SIGUSR1, "SIGQUIT", 10),
        (api.SIGRTMIN, "", 34),
        (api.SIGRTMINPLUS15, "", 49),
        (api.SIGRTMAXMINUS14, "", 50),
        (api.SIGRTMAX, "", 64),
        (api.SIGCLD, "", 17),
        (api.SIGIOT, "", 6),
        (api.SIGPOLL, "", 29),
    ],
)
def test_the_stop_signal_is_the_requests_then_the_images_then_sigterm(
    asked: api.Signal.ValueType, image: str, expected: int
) -> None:
    wish = wishes.container(stop_signal=asked)
    assert spec.stop_signal(wish, spec.ImageConfig(stop_signal=image)) == expected


@pytest.mark.parametrize("image", ["SIGNONE", "0", "65", "-9", "٣", "SIGRTMIN+16", " ", "SIG"])
def test_an_unknown_signal_of_the_image_is_refused(image: str) -> None:
    config = spec.ImageConfig(cmd=("/x",), stop_signal=image)
    with pytest.raises(errors.InvalidArgument, match="signal"):
        wishes.validate(wishes.container(), image=config)


def test_an_unknown_signal_of_the_request_is_refused() -> None:
    with pytest.raises(errors.InvalidArgument, match="stop_signal"):
        wishes.validate(wishes.container(stop_signal=66))


def test_every_signal_of_cri_survives_the_way_there_and_back() -> None:
    for name, value in api.Signal.items():
        number = spec.stop_signal(wishes.container(stop_signal=value), spec.ImageConfig())
        usual = {"RUNTIME_DEFAULT": "SIGTERM", "SIGIOT": "SIGABRT", "SIGCLD": "SIGCHLD"}
        expected = usual.get(name, "SIGIO" if name == "SIGPOLL" else name)
        assert api.Signal.Name(spec.stop_signal_value(number)) == expected


def test_a_number_that_cri_has_no_name_for_is_the_default() -> None:
    assert spec.stop_signal_value(0) == api.RUNTIME_DEFAULT
