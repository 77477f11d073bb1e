"""Which checkpoints stay in a store, which orbax does not know."""

from cpt_jax.checkpoint.keep import Keep


def test_as_many_checkpoints_stay_as_on_a_disk():
    losses = {step: float(loss) for step, loss in zip(range(10, 110, 10), [9, 1, 7, 6, 2, 4, 3, 8, 5, 6], strict=True)}
    assert Keep(last=2).kept(losses) == {90, 100}
    assert Keep(last=1, every=40).kept(losses) == {10, 50, 90, 100}
    assert Keep(last=1, best=2).kept(losses) == {20, 50, 100}
