"""Build the content of the report: claims, other measurements, studies and sources."""

from collections import Counter
from collections.abc import Sequence
from datetime import date
from typing import Any, cast

import torch

from alexnet_repro.claims import power
from alexnet_repro.claims.declared import Declared
from alexnet_repro.claims.evidence import why_refused, why_uncounted
from alexnet_repro.claims.finding import Finding
from alexnet_repro.claims.paper import Claim, expected_errors, read_claims
from alexnet_repro.claims.results import Result, label
from alexnet_repro.claims.scores import VIEW_NAMES
from alexnet_repro.claims.study import Study, baselines, studies
from alexnet_repro.claims.verdict import DECIDED, SINGLE, deciding, judge, status
from alexnet_repro.configs import CHECKOUT
from alexnet_repro.page.cost import cost
from alexnet_repro.page.declared import presented_declaration
from alexnet_repro.page.intervals import bar, domain
from alexnet_repro.page.study import (
    SCALES,
    baseline,
    failures,
    heading,
    is_proxy,
    markdown,
    presented,
    sentences,
    title,
)
from alexnet_repro.page.wording import PRECISIONS, interval, logged, numbers, rule, said
from alexnet_repro.provenance import machine

CLASS_OF = {  # CSS class that sets the colour of a verdict
    "reproduced": "good",
    "right direction": "half",
    "right direction, other size": "half",
    "not found": "bad",
    "undecided": "half",
    "contradicted": "bad",
    "counted: equal": "good",
    "counted: differs": "half",  # from the paper's text; its architecture is what is counted
    "proxy: agrees": "good",
    "proxy: undecided": "half",
    "proxy: disagrees": "bad",
    "proxy: not found": "bad",
}


def content(results: list[Result], declared: Sequence[Declared] = ()) -> dict[str, Any]:
    """Return the content of the page: a row for each claim, the other measurements and the sources.

    declared: the studies that were declared before their runs.
    """
    compared = studies(results)
    claims, found = read_claims(), judge(results, compared)
    others = [
        row(claims[name], [], []) | answer(finding)
        for name, findings in found.items()
        for finding in findings
        if not any(finding is decides for decides in deciding(findings))
    ]
    rows = [
        row(claims[name], deciding(findings), why_uncounted(claims[name], results)) for name, findings in found.items()
    ]
    return {
        "rows": rows,
        "others": others,
        "verdicts": verdicts(rows),
        "headline": headline(rows, others, results, compared),
        "declared": [presented_declaration(study, results) for study in declared],
        "refused": [
            (result["file"].removeprefix(f"{CHECKOUT}/"), why) for result in results if (why := why_refused(result))
        ],
        "studies": [
            presented(study) | {"heading": heading(study, compared[0]), "markdown": markdown(study), "study": study}
            for study in compared
        ],
        "baselines": [
            {"title": title(study), "baseline": baseline(study), "study": study} for study in baselines(results)
        ],
        "ensembles": [ensemble(result) for result in results if "gain" in result],
        "sources": [source(result) for result in results],
        "results": results,
        "found": found,
        "expected": expected_lines(),
        "date": date.today().isoformat(),
        "machine": machine(torch.device("cpu")),
    }


def verdicts(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Count the verdicts: experiments (one for each recipe and net), counted properties, then the rest."""
    answers = Counter(answer["verdict"] for row in rows for answer in row["answers"])
    rest = Counter(row["status"] for row in rows if row["status"] not in ("", "counted"))
    order = (*DECIDED, *SINGLE, "counted: equal", "counted: differs")
    return {word: answers[word] for word in order if answers[word]} | dict(rest.most_common())


def headline(
    rows: list[dict[str, Any]], others: list[dict[str, Any]], results: list[Result], compared: list[Study]
) -> list[str]:
    """Return what was found in a few sentences: each experiment that counts, the study, proxies and counted properties."""
    trained = sorted({str(r.get("data")) for r in results if str(r.get("data")).startswith("ilsvrc")})
    decided = [_told(row) for row in rows if row["answers"] and row["kind"] != "count"]
    study = [
        f"Ablations ({title(own)}{'; a proxy' if is_proxy(own) else ''}). {' '.join(dict.fromkeys([told[0], *failures(own)]))}"
        for own in compared[:1]
        if (told := sentences(own))
    ]
    proxies: dict[str, set[str]] = {}
    for line in others:
        if line["verdict"].startswith("proxy"):
            proxies.setdefault(line["short"], set()).add(line["verdict"].removeprefix("proxy: "))
    disagree = [name for name, words in proxies.items() if "disagrees" in words]
    agree = [name for name, words in proxies.items() if "agrees" in words and name not in disagree]
    absent = [
        name
        for name, words in proxies.items()
        if "not found" in words and "agrees" not in words and name not in disagree
    ]
    counted = {row["short"]: row["answers"][0]["verdict"] for row in rows if row["kind"] == "count"}
    differ = [name for name, verdict in counted.items() if verdict == "counted: differs"]
    waiting = Counter(row["status"] for row in rows)
    return [
        f"Trained on ImageNet: {', '.join(trained) or 'nothing yet'}.",
        *decided,
        *study,
        *(
            [
                f"Proxies, the same experiments on other data, with a smaller net or fewer epochs, tested {len(proxies)} claims: "
                f"{_counted(agree)} in agreement with the direction of the paper's claim in at least one experiment and in "
                f"disagreement in none, {_counted(disagree)} in disagreement in at least one, {_counted(absent)} whose effect was "
                f"not found in at least one, {len(proxies) - len({*agree, *disagree, *absent})} undecided. (A claim about top-1 and "
                "top-5 errors needs both.)"
            ]
            if proxies
            else []
        ),
        f"Of {len(counted)} numbers of the paper that can be computed without training, {len(counted) - len(differ)} are those of "
        f"the net and {_counted(differ)} are not; the report explains each.",
        f"Of {len(rows)} claims, {waiting['not run']} have not been tested at all, {waiting['proxy only']} only by proxies, and "
        f"{waiting['not comparable']} have results that cannot be compared with the paper's.",
    ]


def _told(row: dict[str, Any]) -> str:
    """Return a claim and what each experiment, with its recipe and net, says of it."""
    told = [
        f"{answer['here']} ({f'95% interval {spread}; ' if (spread := answer['interval']) else ''}{answer['where']}): {answer['verdict']}"
        for answer in row["answers"]
    ]
    rule = row["about"].get("reproduced if")
    return f"{row['says']} Measured: {'; '.join(told)}." + (f" (Reproduced if {rule}.)" if rule else "")


def _counted(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names)})" if names else "0"


def row(claim: Claim, answers: list[Finding], uncounted: list[str]) -> dict[str, Any]:
    """Return a row of the claims table: the paper's claim, and an answer for each recipe and net.

    uncounted: why other results do not count, as from ``evidence.why_uncounted``.
    """
    about = {
        "measured on": ", ".join(part for part in (claim.data, claim.split, claim.protocol) if part),
        "2012 log": "; ".join(part for part in (logged(claim), claim.log_note) if part),
        "reproduced if": rule(claim),
        "derivation": claim.derivation,
        "seeds that the rule needs": power.in_words(claim),
        "note": claim.note,
        "results that do not count": "; ".join(uncounted) if claim.is_tested else "",
        "command": claim.command,
        "cost": cost(claim),
    }
    return {
        "name": claim.name,
        "kind": claim.kind,
        "section": claim.section,
        "short": claim.short,
        "says": claim.says,
        "paper": said(claim),
        "of": " ".join(part for part in (claim.data, claim.split) if part and part != "split not stated"),
        "about": {key: text for key, text in about.items() if text},
        "answers": [answer(finding) for finding in answers],
        "status": status(claim, answers, uncounted),
    }


def answer(finding: Finding) -> dict[str, Any]:
    """Return the table entries of a finding: numbers, interval, origin and verdict."""
    claim, facts, first = finding.claim, finding.shared, (finding.results or [{}])[0]
    keys = list(claim.value) or list(finding.estimates)[:1]  # those that the verdict is about
    intervals = [interval(claim, key, finding.estimates[key]) for key in keys if finding.estimates[key].low is not None]
    where = [str(facts[key]) for key in ("data", "net", "ablation", "recipe", "options") if facts.get(key)]
    if facts.get("data") == "folder" and first.get("source"):
        where[0] = f"images of {first['source']}"
    if facts.get("scale") == "proxy":
        where.insert(1, SCALES["proxy"])
    if "ratios" in first:
        where.append(first.get("machine", ""))
    if facts.get("epochs"):
        where.append(f"{facts['epochs']} epochs")
    if facts.get("precision"):
        where.append(PRECISIONS.get(facts["precision"], facts["precision"]))
    if members := first.get("members"):
        where.append(f"{members} nets")
    elif finding.seeds and facts.get("data"):
        where.append(f"seed{'s' if len(finding.seeds) > 1 else ''} {', '.join(map(str, finding.seeds))}")
    measured = [cast(dict[str, Any], result).get(claim.measure) for result in finding.results]
    losses = [values["log_loss"] for values in measured if isinstance(values, dict) and "log_loss" in values]
    return {
        "here": numbers(claim, {key: finding.estimates[key].value for key in keys}),
        "interval": " / ".join(intervals),
        "log_loss": f"{sum(losses) / len(losses):.3f} nats" if losses and claim.kind == "number" else "",
        "where": ", ".join(where),
        "why": finding.caveat or (finding.proxy and f"proxy: {finding.proxy}") or "",
        "verdict": finding.verdict,
        "class": CLASS_OF.get(finding.verdict, "none"),
        "in_study": facts.get("experiment") == "ablations" and claim.measure == "ten_crop",
        "bar": drawn_interval(finding, keys[0]) if keys else None,
    }


def drawn_interval(finding: Finding, key: str) -> dict[str, Any] | None:
    """Return the bar of a finding's first measure, with the claim's tolerance unless the finding is a proxy."""
    claim, found = finding.claim, finding.estimates[key]
    if claim.kind not in ("number", "difference", "ratio"):
        return None
    ratio = claim.kind == "ratio"
    band = None
    if claim.tolerance and not finding.proxy:
        band = (claim.value[key] - claim.tolerance[key], claim.value[key] + claim.tolerance[key])
    neutral = found.value if claim.kind == "number" else claim.neutral
    return bar(found, domain([found], neutral, *(band or ()), ratio=ratio), neutral, band, ratio=ratio)


def expected_lines() -> list[tuple[str, str, float, float]]:
    """Return (ablation or claim, data, top-1 error, top-5 error) of the paper's ten-crop experiments."""
    lines = []
    for name, claim in read_claims().items():
        if claim.run and (pair := expected_errors(name)):
            wanted = claim.run[0]
            what = name if {"members", "pretraining"} & set(wanted) else wanted["ablation"]
            lines.append((what, f"{claim.data} {claim.split}", pair["top1_error"], pair["top5_error"]))
    return lines


def source(result: Result) -> dict[str, str]:
    """Return a row of the table of results."""
    errors = [
        f"{view['top1_error']:.1f} / {view['top5_error']:.1f}"
        if (view := cast(dict[str, Any], result).get(key))
        else ""
        for key in ("centre", "ten_crop")
    ]
    return {
        "file": result["file"].removeprefix(f"{CHECKOUT}/"),
        "what": label(result) if "recipe" in result else "speed",
        "measured on": f"{result['images']:,} {result['split']}" if {"images", "split"} <= result.keys() else "",
        "epochs": str(result.get("epochs", "")),
        "one view": errors[0],
        "ten crops": errors[1],
        "hardware": result.get("hardware") or result.get("machine", ""),
        "commit": (result.get("commit") or "")[:10],
        "command": result.get("command", ""),
    }


def ensemble(result: Result) -> dict[str, str]:
    """Return a row of the table of ensembles: the members' mean error, the ensemble's, and the gain."""
    facts = cast(dict[str, Any], result)
    lower, error = facts["gain"]["top1_error"], facts[facts["gain"]["view"]]["top1_error"]
    one, five = (read_claims()[name].value["top1_error"] for name in ("one_cnn", "five_cnns"))
    return {
        "what": ", ".join(
            part
            for part in (label(result), SCALES.get(result.get("scale", "")), VIEW_NAMES[facts["gain"]["view"]])
            if part
        ),
        "alone": f"{error + lower['value']:.2f}",
        "together": f"{error:.2f}",
        "gain": f"{lower['value']:.1f} ({lower['low']:.1f} to {lower['high']:.1f})",
        "paper": f"from {one:g}% to {five:g}% with five networks",
    }


def summary(page: dict[str, Any]) -> str:
    """Return the number of claims with each verdict as text.

    Experiments and counted properties are counted separately.
    """
    counts = page["verdicts"]
    by_experiment = [f"{n} {word}" for word, n in counts.items() if word in DECIDED or word in SINGLE]
    counted = [
        f"{n} {'equal to the paper' if word.endswith('equal') else 'different'}"
        for word, n in counts.items()
        if word.startswith("counted")
    ]
    rest = [
        f"{n} {word}"
        for word, n in counts.items()
        if word in ("quoted", "for the reader", "not run", "proxy only", "not comparable")
    ]
    return (
        f"{len(page['rows'])} claims. By experiment, one for each net and recipe: {', '.join(by_experiment) or 'none decided yet'}. "
        f"Counted on the net: {', '.join(counted)}. Others: {', '.join(rest)}"
    )
