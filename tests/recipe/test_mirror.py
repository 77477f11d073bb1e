"""A run in a store is one process's at a time."""

import time

from cpt_jax.core.stores import Store
from cpt_jax.recipe import mirror
from cpt_jax.recipe.mirror import Lease


def test_a_lease_is_one_process_s(monkeypatch):
    monkeypatch.setattr(mirror, "REFRESH_SECONDS", 0.1)
    store = Store("memory://bucket/leased")
    first, second = Lease(store), Lease(store)
    assert first.take() is None
    # One elsewhere sees that it is renewed, and one on the same machine that its process lives.
    second._own["place"] = "elsewhere"
    assert "is running in" in (second.take() or "")
    monkeypatch.setattr(mirror, "_alive", lambda process: True)
    assert "is running in" in (Lease(store).take() or "")
    first.give_back()
    assert second.take() is None
    second.give_back()


def test_a_lease_that_is_not_renewed_is_over(monkeypatch):
    store = Store("memory://bucket/left")
    killed = Lease(store)
    store.write(".lease.json", killed._content())
    monkeypatch.setattr(mirror, "LEASE_SECONDS", 1.0)
    # On the same machine, its process is known to be no more; elsewhere, by waiting.
    here, elsewhere = Lease(store), Lease(store)
    assert here.take() is None
    here._over.set()
    elsewhere._own["place"] = "elsewhere"
    started = time.monotonic()
    assert elsewhere.take() is None
    assert time.monotonic() - started >= 1.0
    here.give_back()
    assert store.read(".lease.json") is not None
    elsewhere.give_back()
    assert store.read(".lease.json") is None
