"""What a run counts with in a law: its share of replay, its tokens, and which other runs it goes with."""

import dataclasses
import json

import pytest
from many_runs import changed_stage, write_run

from cpt_jax.core.errors import UserError
from cpt_jax.laws.fit import fit_law
from cpt_jax.report.many import find_runs, mean_shares, read_run
from cpt_jax.report.side_by_side import alike, points_of
from cpt_jax.training.ending import ENDED, end_early
from cpt_jax.training.watch import RAISED, WATCHED


def test_a_schedule_counts_with_its_mean(tmp_path):
    ramp = {"kind": "Ramp", "start": {"en": 0.5, "zh": 0.5}, "end": {"en": 0.1, "zh": 0.9}}
    phases = {"kind": "Phases", "parts": [{"share": 0.5, "mixture": ramp}, {"share": 0.5, "mixture": {"zh": 1.0}}]}
    assert mean_shares(phases, tmp_path)["en"] == pytest.approx(0.15)


def test_a_stage_that_ended_early_counts_with_what_it_trained_on(tmp_path):
    write_run(tmp_path / "runs" / "a", 0.25, tokens=1_000_000)
    assert read_run(tmp_path / "runs/a").tokens == 1_000_000
    end_early(tmp_path / "runs/a/stages/1-lora", 30, "stop: en is 3% worse")
    run = read_run(tmp_path / "runs/a")
    assert (run.tokens, run.replay) == (300_000, pytest.approx(0.25))


def test_a_stage_whose_watch_raised_the_replay_counts_with_what_was_read(tmp_path):
    for name in ("plain", "raised"):
        write_run(tmp_path / "runs" / name, 0.25, watch=True)
        metrics = tmp_path / "runs" / name / "stages/1-lora/metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        # Half of the way with the recipe's share, half with 50%; rows do not fall on it exactly.
        counted = [line | {"read/zh": 752 if line["step"] <= 20 else 500} for line in lines]
        metrics.write_text("".join(json.dumps(line | {"read/en": 1000 - line["read/zh"]}) + "\n" for line in counted))
    watch = tmp_path / "runs/raised/stages/1-lora/watch.jsonl"
    seen = [json.loads(line) for line in watch.read_text().splitlines()]
    seen[3]["action"] = "raise replay from 25.0% to 50.0%: en is 3.00% worse than the base, the limit is 2.00%"
    watch.write_text("".join(json.dumps(line) + "\n" for line in seen))
    plain, raised = find_runs([tmp_path])[0]
    assert plain.point.share == 0.25
    assert raised.point.share == pytest.approx((0.248 + 0.5) / 2)
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="raised the replay, and its metrics"):
        read_run(tmp_path / "runs/raised")


def test_tokens_are_those_of_whole_steps(tmp_path):
    write_run(tmp_path / "a", 0.25)
    changed_stage(tmp_path / "a", tokens=1_000_001)
    assert read_run(tmp_path / "a").tokens == 1_010_000


def test_where_the_mixture_does_not_tell_the_share_is_that_of_what_was_learnt(tmp_path):
    stage = tmp_path / "a" / "stages" / "1-lora"
    ramp = {"kind": "Ramp", "start": {"en": 0.5, "zh": 0.5}, "end": {"en": 0.0, "zh": 1.0}, "shape": "linear"}
    write_run(tmp_path / "a", 0.25)
    lines = [{"step": step, "tokens": 100, "read/en": 40, "read/zh": 60} for step in range(1, 11)]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def share():
        return pytest.approx(read_run(tmp_path / "a").replay)

    assert share() == 0.25
    changed_stage(tmp_path / "a", max_epochs={"zh": 1})
    assert share() == 0.4
    changed_stage(tmp_path / "a", max_epochs=None, mixture=ramp)
    assert share() == 0.25
    end_early(stage, 10, "stop: en is 3% worse")
    assert share() == 0.4
    (stage / ENDED).unlink()
    for action, expected in (("stop: en is 3% worse", 0.25), (f"{RAISED} from 5.0% to 7.5%: en is 3% worse", 0.4)):
        (stage / WATCHED).write_text(json.dumps({"step": 5, "bits_per_byte": {}, "action": action}) + "\n")
        assert share() == expected


def test_seeds_that_read_near_one_share_are_one_share_of_the_law(tmp_path):
    """A law fitted with a share's other seeds would know what it is to predict."""
    shares = (0.02, 0.05, 0.1, 0.25, 0.5)
    for share in shares:
        for seed, off in enumerate((0.98, 1.0, 1.01)):
            write_run(tmp_path / "runs" / f"{share}-{seed}", share, seed, noise=0.002)
            changed_stage(tmp_path / "runs" / f"{share}-{seed}", max_epochs={"zh": 9})
            metrics = tmp_path / "runs" / f"{share}-{seed}" / "stages/1-lora/metrics.jsonl"
            lines = [json.loads(line) for line in metrics.read_text().splitlines()]
            read = {"read/en": 1000 * share * off, "read/zh": 1000 - 1000 * share * off}
            metrics.write_text("".join(json.dumps(line | read) + "\n" for line in lines))
    points = points_of(find_runs([tmp_path])[0])
    law = fit_law(points, "en", is_new=False, draws=2)
    assert len({point.share for point in law.points}) == 15
    assert [each.share for each in law.held_out] == [share for share in shares for _ in range(3)]
    with pytest.raises(UserError, match="shares of replay, and there are 2"):
        fit_law([point for point in points if point.asked in (0.1, 0.25)], "en", is_new=False)


@pytest.mark.parametrize("first", ["a", "b"])
def test_a_law_is_of_one_base_a_size(tmp_path, first):
    """Which may lie in several places."""
    runs = []
    for base, loss, at in (("a", 1.0, 100), ("b", 1.3, 100), ("elsewhere", 1.0, 100), ("large", 0.9, 200)):
        for share in (0.0, 0.1, 0.25, 0.5):
            write_run(tmp_path / base / f"{share}", share)
            run = read_run(tmp_path / base / f"{share}")
            settings = {**run.settings, "base": base}
            runs.append(dataclasses.replace(run, settings=settings, parameters=at, base={"en": loss, "zh": 2.0}))
    runs.sort(key=lambda run: run.settings["base"] != first)
    of_law, others = alike(runs)
    assert {run.settings["base"] for run in of_law} == {"a", "elsewhere", "large"}
    assert {run.settings["base"] for run in others} == {"b"}
    assert [point.losses["en"] for point in points_of(of_law) if point.tokens == 0] == [1.0, 0.9]


def test_a_law_is_of_runs_that_divide_what_is_new_alike(tmp_path):
    """Of two new domains, each share of zh stands for the same part of what is new; without new text there is none."""

    def write(name: str, share: float, part: float) -> None:
        write_run(tmp_path / name, share)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["domains"].append({"corpus": {"name": "py", "spec": "py.jsonl"}, "role": "new"})
        new = {"zh": (1 - share) * part, "py": (1 - share) * (1 - part)} if share < 1 else {}
        config["stages"][0]["mixture"] = new | {"en": share}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        entries = json.loads((tmp_path / name / "eval.json").read_text())
        entries += [entry | {"domain": "py"} for entry in entries if entry["domain"] == "zh"]
        (tmp_path / name / "eval.json").write_text(json.dumps(entries))

    for share in (0.0, 0.1, 0.25, 0.5):
        write(f"most-{share}", share, 0.75)
    for share in (0.05, 0.3):
        write(f"little-{share}", share, 0.1)
    write("replay", 1.0, 0.0)
    of_law, others = alike([read_run(path) for path in sorted(tmp_path.iterdir())])
    assert {run.name for run in of_law} == {"most-0.0", "most-0.1", "most-0.25", "most-0.5", "replay"}
    assert {run.name for run in others} == {"little-0.05", "little-0.3"}
