"""The fitted laws of old and new: as text, as figures for JSON, and as a part of a page."""

import dataclasses
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpt_jax.core.errors import UserError
from cpt_jax.laws.answer import Answer, Budget, answer, between, percent
from cpt_jax.laws.critical import CriticalLaw, critical_law
from cpt_jax.laws.fit import Law
from cpt_jax.laws.form import PARAMETERS
from cpt_jax.laws.points import Point
from cpt_jax.report.many_plots import held_out_text, law_plot, tokens_text
from cpt_jax.report.tables import html_table, text_table

BUDGETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What the laws say of some runs: the answer to the budget that was asked for, the answers to the usual ones, and the
    critical ratio's course over the tokens, where there are enough of them."""

    laws: tuple[Law, Law]
    asked: Answer
    others: tuple[Answer, ...]
    critical: CriticalLaw | None

    @classmethod
    def of(
        cls,
        points: Sequence[Point],
        laws: tuple[Law, Law],
        budget: Budget,
        tokens: float | None = None,
        size: float | None = None,
    ) -> "Study":
        try:
            critical = critical_law(points, laws[0].domain, laws[1].domain, budget) if size is None else None
        except UserError:
            critical = None
        return cls(
            laws=laws,
            asked=answer(points, laws, budget, tokens=tokens, size=size),
            others=tuple(answer(points, laws, Budget(amount=each), tokens=tokens, size=size) for each in BUDGETS),
            critical=critical,
        )

    def as_json(self) -> dict[str, Any]:
        """Figures; infinite for a share that no run was enough for, NaN for the R² of runs with one and the same loss."""
        return {
            "answer": self.asked.sentence,
            "budgets": [_answer_json(each) for each in (self.asked, *self.others)],
            "laws": [_law_json(law) for law in self.laws],
            "critical_ratio": None if self.critical is None else _critical_json(self.critical),
            "notes": list(self.asked.notes),
        }


def _answer_json(given: Answer) -> dict[str, Any]:
    return {
        "old": given.old,
        "new": given.new,
        "budget": dataclasses.asdict(given.budget),
        "base": given.base,
        "tokens": given.tokens,
        "size": given.size,
        "replay": dataclasses.asdict(given.replay),
        "cost_on_new": dataclasses.asdict(given.cost),
    }


def _law_json(law: Law) -> dict[str, Any]:
    low, high = np.quantile(law.draws, [0.05, 0.95], axis=0)
    return {
        "domain": law.domain,
        "parameters": law.in_units,
        "free": list(law.form.free),
        "intervals_of_exponents": {
            name: [low[PARAMETERS.index(name)], high[PARAMETERS.index(name)]]
            for name in law.form.free
            if name not in ("E", "A", "B", "C")
        },
        "r_squared": law.r_squared,
        "held_out": [dataclasses.asdict(each) for each in law.held_out],
        "held_out_error": law.held_out_error if law.held_out else None,
        "held_out_r_squared": law.held_out_r_squared if law.held_out else None,
    }


def _critical_json(critical: CriticalLaw) -> dict[str, Any]:
    alpha, s, beta = critical.parameters.tolist()
    return {
        "alpha": alpha,
        "s": s,
        "beta": beta,
        "token_unit": critical.token_unit,
        "ratios": [{"tokens": tokens, **dataclasses.asdict(ratio)} for tokens, ratio in critical.ratios.items()],
    }


def formula(law: Law) -> str:
    """The fitted law with its numbers, in the loss's unit: 0.596 + 1.56/(r + 0.0003)^0.079."""
    p = law.in_units
    terms = [f"{p['E']:.4g}"]
    if p["A"]:
        terms.append(f"{p['A']:.4g}/N^{p['alpha']:.3g}")
    if p["B"]:
        terms.append(f"{p['B']:.4g} r^{p['eta']:.3g}/D^{p['beta']:.3g}")
    terms.append(f"{p['C']:.4g}/(r + {p['epsilon']:.2g})^{p['gamma']:.3g}")
    share = "1 - replay" if law.is_new else "replay"
    return f"loss of {law.domain} = {' + '.join(terms).replace('+ -', '- ')}, r = {share}"


def _budget_rows(study: Study) -> list[list[str]]:
    rows = []
    for each in study.others:
        low, high = each.replay.low, each.replay.high
        if math.isinf(low):
            replay, cost = f"none of those run (up to {percent(each.measured[1])})", ""
        elif math.isinf(high):
            replay, cost = f"{percent(low)} or more", ""
        else:
            replay = "none needed" if high <= each.measured[0] == 0 else between(low, high)
            cost = f"{100 * each.cost.best:+.1f}%"
        rows.append([f"{100 * each.budget.amount:g}%", replay, cost])
    return rows


def _header(study: Study) -> list[str]:
    return [f"{study.asked.old} may lose", "replay", f"{study.asked.new} changes"]


def critical_text(critical: CriticalLaw) -> str:
    """The critical ratio's course in words."""
    last, double = max(critical.ratios), 2 * max(critical.ratios)
    said, then = critical.ratios[last], critical.predict(double)
    alpha, s, beta = critical.parameters
    return (
        f"The most new text that this allows, R(T) = {alpha:.3g} (T/{tokens_text(critical.token_unit)})^{s:.3g} {'+' if beta >= 0 else '-'} {abs(beta):.3g}: "
        f"{between(said.low, said.high)} with {tokens_text(last)} tokens; with {tokens_text(double)}, beyond what was run, {between(then.low, then.high)}"
    )


def study_text(study: Study) -> str:
    """The answer, the table of budgets, the laws and how far to trust them, as text."""
    lines = [study.asked.sentence, "", text_table([_header(study), *_budget_rows(study)]), ""]
    lines += [formula(law) for law in study.laws]
    lines += ["held out: " + held_out_text(law) for law in study.laws]
    lines += [critical_text(study.critical)] if study.critical else []
    return "\n".join(lines + [f"note: {note}" for note in study.asked.notes])


def study_section(study: Study, unit: str, plots: Path) -> str:
    """The laws as a part of a page, with their pictures."""
    figures = "".join(f"<figure>{law_plot(law, study.asked, unit, plots)}</figure>" for law in study.laws)
    table = html_table(list(map(html.escape, _header(study))), _budget_rows(study))
    trust = "".join(f"<p class=note>Held out: {html.escape(held_out_text(law))}.</p>" for law in study.laws)
    course = f"<p>{html.escape(critical_text(study.critical))}.</p>" if study.critical else ""
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in (*map(formula, study.laws), *study.asked.notes))
    return (
        f"<h2>How much to replay</h2><div class=figures>{figures}</div>{table}{course}{trust}"
        f"<details><summary>The laws and what was assumed</summary><ul class=note>{notes}</ul>"
        "<p class=note>Form: Que et al. 2024 (arXiv 2406.01375). Intervals: 90% of laws fitted on data drawn anew from this one and its residuals.</p></details>"
    )
