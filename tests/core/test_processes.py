"""How a process is told who the others are."""

import pytest

from cpt_jax.core import processes
from cpt_jax.core.errors import UserError
from cpt_jax.core.processes import Processes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(coordinator="host:1"), "give --coordinator, --processes and --process together"),
        (dict(count=2, index=0), "give --coordinator, --processes and --process together"),
        (dict(coordinator="host:1", count=2, index=2), "--process is 2: give 0 to 1 for --processes 2"),
        (dict(coordinator="host", count=2, index=0), "--coordinator 'host' has no port: give HOST:PORT"),
    ],
)
def test_what_says_too_little_is_refused_in_one_line(given, message):
    with pytest.raises(UserError, match=message):
        Processes(**given)


def test_alone_there_is_nobody_to_ask():
    assert processes.is_first()
    assert processes.told({"a": 1}) == {"a": 1}
    processes.wait("nobody")
