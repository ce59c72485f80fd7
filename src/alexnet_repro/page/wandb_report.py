"""Publish the report as a W&B Report, with tables of the claims and panels of the project's runs.

Runs logged with logger=wandb have the config keys ablation, recipe and data.name, and the summary keys
ten_crop/top1_error and centre/top1_error. Users can refer to these keys in their own panels.
"""

from typing import Any

from alexnet_repro.errors import UserError
from alexnet_repro.page.markdown import claims_table, others_table


def publish(page: dict[str, Any], project: str, entity: str | None) -> str:
    """Save a report in a Weights & Biases project and return its URL.

    Raises UserError if wandb-workspaces is not installed, if there is no valid API key, or if saving fails.
    """
    import wandb

    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError:
        raise UserError(
            "a W&B Report requires the package wandb-workspaces", "install it with: pip install -e '.[report]'"
        ) from None
    try:
        has_key = wandb.login(prompt=False, verify=False)
    except Exception as error:
        raise UserError(f"W&B rejected the API key: {error}", "index.html and report.md were written") from None
    if not has_key:
        raise UserError(
            "a W&B Report needs the W&B service, but there is no API key; index.html and report.md were written",
            "set WANDB_API_KEY or run wandb login; upload runs that were logged offline with wandb sync FOLDER",
        )
    try:
        owner = entity or str(wandb.Api().default_entity)
        report = wr.Report(
            project=project,
            entity=owner,
            title="ImageNet Classification with Deep Convolutional Neural Networks, claim by claim",
            description="The paper's claims and the measurements of alexnet_repro.",
            width="fluid",
            blocks=blocks(page, wr),
        )
        report.save()
    except Exception as error:  # no common base class: raises wandb, requests and ValueError exceptions
        message = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"W&B did not save the report: {type(error).__name__}: {message}",
            "index.html and report.md were written; check that logger.project and logger.entity name a project with runs",
        ) from None
    return report.url


def blocks(page: dict[str, Any], wr: Any) -> list[Any]:
    """Return the blocks of the report. wr: the module wandb_workspaces.reports.v2."""
    runs = wr.Runset(name="finished runs", filters="State = 'finished'", groupby=["config.ablation"])
    errors = (
        ("ten_crop/top1_error", "top-1 error, ten crops, %"),
        ("ten_crop/top5_error", "top-5 error, ten crops, %"),
    )
    bars = [
        wr.BarPlot(
            title=title,
            metrics=[wr.SummaryMetric(metric)],
            groupby=wr.Config("ablation"),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            layout=wr.Layout(x=9 * i, y=0, w=9, h=9),
        )
        for i, (metric, title) in enumerate(errors)
    ]
    paper_errors = wr.MarkdownPanel(markdown=paper_lines(page), layout=wr.Layout(x=18, y=0, w=6, h=9))
    curves = [
        wr.LinePlot(
            title=title,
            x="epoch",
            y=[metric],
            groupby=wr.Config("ablation"),
            groupby_rangefunc="minmax",
            layout=wr.Layout(x=12 * i, y=0, w=12, h=9),
        )
        for i, (metric, title) in enumerate((("train/top1_error", "training"), ("val/top1_error", "validation")))
    ]
    return [
        wr.TableOfContents(),
        wr.H1("What was found"),
        wr.MarkdownBlock("\n".join(f"- {sentence}" for sentence in page["headline"])),
        *(
            wr.MarkdownBlock(
                f"**{study['heading']}**: {study['title']}. {' '.join(study['sentences'])}\n\n{study['markdown']}"
            )
            for study in page["studies"]
        ),
        wr.H1("Claims"),
        wr.MarkdownBlock(claims_table(page)),
        *([wr.H1("Other measurements"), wr.MarkdownBlock(others_table(page))] if page["others"] else []),
        wr.H1("Errors by ablation"),
        wr.PanelGrid(runsets=[runs], panels=[*bars, paper_errors]),
        wr.H1("Top-1 error by epoch"),
        wr.PanelGrid(runsets=[runs], panels=curves),
        wr.H1("Differences between runs"),
        wr.PanelGrid(
            runsets=[runs], panels=[wr.RunComparer(diff_only="split", layout=wr.Layout(x=0, y=0, w=24, h=12))]
        ),
    ]


def paper_lines(page: dict[str, Any]) -> str:
    """Return the paper's ImageNet errors by ablation as a Markdown table, to show beside the bar charts."""
    lines = ["The paper, ten crops:", "", "| ablation | data | top-1 | top-5 |", "|---|---|---|---|"]
    lines += [f"| {name} | {data} | {one:.1f} | {five:.1f} |" for name, data, one, five in page["expected"]]
    return "\n".join(lines)
