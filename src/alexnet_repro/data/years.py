"""Tell the years of ILSVRC apart by the names of archives and numbered images."""

import re
from pathlib import Path

from alexnet_repro.data.listing import Account, File
from alexnet_repro.errors import UserError

YEAR = re.compile(r"ILSVRC(\d{4})_(?=img|images|train|val|test)")


def of_year(
    path: Path, files: list[File], folders: set[str], year: int | None, account: Account
) -> tuple[list[File], set[str]]:
    """Return the files and folders of a year of ILSVRC, and those whose names have none; leave out others.

    Raises UserError if all years in names are others, or if there are several years and no ``year``.
    """
    years = {int(found) for found in YEAR.findall(path.name)}
    of_file = [int(match[1]) if (match := YEAR.search(file.name)) else None for file in files]
    years |= {found for found in of_file if found is not None}
    if year is None:
        if len(years) > 1:
            raise UserError(
                f"{path} holds ILSVRC of several years: {', '.join(map(str, sorted(years)))}",
                "move one of them to another folder, or name the data set: data=ilsvrc2010 or data=ilsvrc2012",
            )
        return files, folders
    if years and year not in years:
        raise UserError(
            f"{path} holds ILSVRC of {', '.join(map(str, sorted(years)))}, not of {year}",
            f"choose data=ilsvrc{min(years)}, or set source to ILSVRC{year}",
        )
    kept = []
    for file, found in zip(files, of_file, strict=True):
        if found in (None, year):
            kept.append(file)
        else:
            account.leave_out(f"files of ILSVRC {found}", file.name)
    return kept, {name for name in folders if not (match := YEAR.search(name)) or int(match[1]) == year}
