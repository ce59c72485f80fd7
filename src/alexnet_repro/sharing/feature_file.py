"""Write features to a file as they are computed."""

import errno
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from omegaconf import DictConfig
from tqdm import tqdm

from alexnet_repro.data.split import Split
from alexnet_repro.data.store import Store
from alexnet_repro.errors import Interrupted, UserError, needed
from alexnet_repro.files import one_process_at_a_time, read_json, write_json, written_whole
from alexnet_repro.sharing.features import Inputs, checked, outputs
from alexnet_repro.sharing.nets import TrainedNet, load, preprocessing

CHUNK = 1024  # rows that are held in memory while a file is written
SHOWN = 5  # unreadable images that are named on the screen


def features(cfg: DictConfig) -> dict[str, Any]:
    """Write the outputs of layers for the images of ``cfg.source`` to ``cfg.out``: a .npz, .h5 or .parquet file.

    The file holds the names of the images, in the order of the rows, one float32 array (N, ...) for each layer, and a
    description of the net. Finished batches are kept in OUT.partial, and the same command continues after an
    interruption. Memory does not grow with the number of images. The rows of an unreadable image are NaN.

    Returns the number of images and the unreadable ones. Raises UserError for unusable options, and Interrupted.
    """
    out = Path(str(cfg.out or ""))
    if cfg.run is None or cfg.source is None or cfg.out is None:
        raise UserError(
            "run, source and out are needed",
            "for example run=runs/paper/seed-0 source=FOLDER layers=[conv5,fc7] out=features.npz",
        )
    if out.suffix not in WRITERS:
        raise UserError(f"out={out}: the name must end with {', '.join(WRITERS)}", "for example out=features.npz")
    if out.exists():
        raise UserError(f"{out} exists", "remove it, or choose another name with out=PATH")
    if package := NEEDS.get(out.suffix):
        needed(package, f"a {out.suffix} file")
    trained = load(str(cfg.run), checkpoint=cfg.checkpoint, at_chance=cfg.at_chance)
    checked(trained.model, cfg.layers, cfg.per_tower)
    source = Path(str(cfg.source))
    images: Path | Split = source
    if (source / "manifest.json").is_file():
        store = Store(source)
        images = store.split(cfg.split or store.measured_split)
        state = [store.images_sha256]
    elif cfg.split is not None:
        raise UserError(f"split={cfg.split} is for a store, and {source} is none", "remove split")
    inputs = Inputs(images, trained.model)
    if images is source:
        found = [path.stat() for path in inputs.files]
        state = [str(source.resolve()), *(f"{file.st_size} {file.st_mtime_ns}" for file in found)]
    identity = {
        "weights": trained.sha256,
        "layers": list(cfg.layers),
        "per_tower": cfg.per_tower,
        "images": hashlib.sha256("\0".join([*state, *inputs.names]).encode("utf-8", "backslashreplace")).hexdigest(),
    }
    in_use = f"{out} is being written by another process"
    with one_process_at_a_time(out, in_use, "wait, or choose another name with out=PATH"):
        return compute(cfg, trained, inputs, identity, out)


def compute(
    cfg: DictConfig, trained: TrainedNet, inputs: Inputs, identity: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Compute the features and write the file, whose lock the caller holds. identity: what the rows depend on."""
    facts = {
        "net": str(cfg.run),
        "sha256_of_checkpoint": trained.sha256,
        **trained.facts,
        "source": str(cfg.source),
        "layers": list(cfg.layers),
        "per_tower": cfg.per_tower,
        "preprocessing": preprocessing(trained.model),
    }
    partial = Partial(out.with_name(out.name + ".partial"), identity)
    count = len(inputs.names)
    try:
        with tqdm(total=count, initial=partial.rows, desc="features", unit=" images") as bar:
            for _, part, unreadable in outputs(
                trained.model, inputs, cfg.layers, cfg.per_tower, cfg.batch_size, cfg.device, partial.rows
            ):
                partial.add(part, [(inputs.names[index], reason) for index, reason in unreadable])
                bar.update(len(next(iter(part.values()))))
    except KeyboardInterrupt:
        raise Interrupted(f"{partial.rows} of {count} images are done; the same command continues") from None
    if len(partial.unreadable) == count:
        partial.remove()
        name, reason = partial.unreadable[0]
        raise UserError(f"none of the {count} images is readable; {name}: {reason}")
    if partial.unreadable:
        print(f"{len(partial.unreadable)} of {count} images are not readable; their rows are NaN:")
        for name, reason in partial.unreadable[:SHOWN]:
            print(f"  {name}: {reason}")
        if len(partial.unreadable) > SHOWN:
            print(f"  and {len(partial.unreadable) - SHOWN} more, which {out} lists")
    facts["unreadable"] = [name for name, _ in partial.unreadable]
    needs = count * sum(4 * int(np.prod(shape, dtype=np.int64)) for shape in partial.row_shapes.values())
    disk = shutil.disk_usage(out.parent)
    if disk.free < needs and disk.total:  # the HDF5 library crashes on a full disk
        raise OSError(errno.ENOSPC, f"{needs / 1e9:.1f} GB are needed", str(out))
    with written_whole(out) as file:
        WRITERS[out.suffix](file, inputs.names, partial, json.dumps(facts))
    partial.remove()
    shapes = ", ".join(f"{name} {shape}" for name, shape in partial.shapes(count).items())
    print(f"written to {out}: {count} images, {shapes}")
    return {"images": count, "unreadable": facts["unreadable"], "out": str(out)}


class Partial:
    """Rows that are finished, in a folder: LAYER.f32, raw float32, and progress.json.

    identity: what the rows depend on. Raises UserError if the folder holds the rows of something else, or other files.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self.rows = 0
        self.row_shapes: dict[str, list[int]] = {}
        self.unreadable: list[tuple[str, str]] = []
        progress = folder / "progress.json"
        if progress.is_file():
            try:
                known = read_json(progress)
                before, self.rows, self.row_shapes = known["identity"], known["rows"], known["row_shapes"]
                self.unreadable = [(name, reason) for name, reason in known["unreadable"]]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{progress} is damaged", f"remove {folder} to start again") from None
            if before != identity:
                raise UserError(
                    f"{folder} holds an interrupted command's features of another net, other layers or other images",
                    "remove it, or choose another name with out=PATH",
                )
            for name in self.row_shapes:  # rows after those that progress.json counts may be incomplete
                path, counted = self._path(name), self.rows * self._row_bytes(name)
                if not path.is_file() or path.stat().st_size < counted:
                    raise UserError(f"{path} lacks some of {self.rows} rows", f"remove {folder} to start again")
                os.truncate(path, counted)
        elif folder.is_symlink():
            raise UserError(f"{folder} is a link", "remove it, or choose another name with out=PATH")
        elif folder.exists():  # without progress.json, nothing says what the rows are
            if not folder.is_dir() or any(
                path.suffix not in (".f32", ".tmp", ".alexnet_repro") for path in folder.iterdir()
            ):
                raise UserError(
                    f"{folder}, which would hold unfinished features, exists and holds something else",
                    "rename it, or choose another name with out=PATH",
                )
            for path in folder.glob("*.f32"):
                path.unlink()

    def add(self, part: dict[str, NDArray[np.float32]], unreadable: list[tuple[str, str]]) -> None:
        """Append the rows of a batch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, values in part.items():
            self.row_shapes.setdefault(name, list(values.shape[1:]))
            with self._path(name).open("ab") as file:
                file.write(values.tobytes())
                file.flush()
                os.fsync(file.fileno())  # before progress.json counts these rows
        self.rows += len(next(iter(part.values())))
        self.unreadable += unreadable
        content = {"identity": self.identity, "rows": self.rows, "row_shapes": self.row_shapes, "unreadable": self.unreadable}  # fmt: skip
        write_json(self.folder / "progress.json", content)

    def shapes(self, count: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each layer's array with ``count`` rows."""
        return {name: (count, *shape) for name, shape in self.row_shapes.items()}

    def chunks(self, name: str) -> Iterator[NDArray[np.float32]]:
        """Yield the rows of a layer, at most CHUNK at once."""
        shape = self.row_shapes[name]
        found, expected = self._path(name).stat().st_size, self.rows * self._row_bytes(name)
        if found != expected:
            raise UserError(
                f"{self._path(name)} has {found} bytes, not {expected}", f"remove {self.folder} to start again"
            )
        with self._path(name).open("rb") as file:
            while data := file.read(CHUNK * self._row_bytes(name)):
                yield np.frombuffer(data, np.float32).reshape(-1, *shape)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.f32"

    def _row_bytes(self, name: str) -> int:
        return 4 * int(np.prod(self.row_shapes[name], dtype=np.int64))


def _write_npz(file: IO[bytes], names: list[str], partial: Partial, facts: str) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in (("names", np.array(names)), ("description", np.array(facts))):
            with archive.open(f"{name}.npy", "w") as part:
                npy.write_array(part, array, allow_pickle=False)
        for name, shape in partial.shapes(len(names)).items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as part:
                header = {"descr": npy.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
                npy.write_array_header_1_0(part, header)
                for rows in partial.chunks(name):
                    part.write(rows.tobytes())


def _write_h5(file: IO[bytes], names: list[str], partial: Partial, facts: str) -> None:
    import h5py

    with h5py.File(file.name, "w") as content:
        content.attrs["description"] = facts
        content.create_dataset("names", data=names, dtype=h5py.string_dtype())
        for name, shape in partial.shapes(len(names)).items():
            data, first = content.create_dataset(name, shape, np.float32), 0
            for rows in partial.chunks(name):
                data[first : first + len(rows)] = rows
                first += len(rows)


def _write_parquet(file: IO[bytes], names: list[str], partial: Partial, facts: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    widths = {name: int(np.prod(shape, dtype=np.int64)) for name, shape in partial.row_shapes.items()}
    fields = [pa.field("name", pa.string())]
    for name, width in widths.items():
        shape = {"shape": json.dumps(partial.row_shapes[name])}
        fields.append(pa.field(name, pa.list_(pa.float32(), width), metadata=shape))
    schema = pa.schema(fields, metadata={"description": facts})
    with pq.ParquetWriter(file, schema) as writer:
        first = 0
        for parts in zip(*(partial.chunks(name) for name in widths), strict=True):
            columns = [pa.array(names[first : first + len(parts[0])], pa.string())]
            for rows, width in zip(parts, widths.values(), strict=True):
                columns.append(pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), width))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            first += len(parts[0])


WRITERS = {".npz": _write_npz, ".h5": _write_h5, ".parquet": _write_parquet}
NEEDS = {".h5": "h5py", ".parquet": "pyarrow"}
