"""Turn public data into a store: checked for units and axes, projected where it must conserve mass, digested.

    python launch/ingest_data.py FORMAT SOURCE STORE [key=value ...]

FORMAT        SOURCE                                        STORE becomes
openfwi       a family's folder                             gathers (data/gathers.py)
jhtdb         an HDF5 cut-out, or a folder of them          a flow; needs dataset=isotropic1024coarse|channel|...
digital_rocks a .raw, .tif, .mat or .npz, or a folder       an image of rock (data/rocks.py)
              of TIFF slices
the_well      an .hdf5 file, or a folder of them            a flow
pdebench      an .hdf5 file, or a folder of them            a flow

Keys, such as num_test=2: the config class in data/ingest/FORMAT.py. What a format holds: data/cards/FORMAT.md.
A source is verified by the SHA256SUMS beside it (sha256sum FILES > SHA256SUMS, made where the files come from) or
NAME.sha256; without one it is refused unless unverified=accept is given. Interrupted, the same command continues.
"""

from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from shodh.command_line import run
from shodh.config import ConfigError, parse_config

FORMATS = {
    "openfwi": "OpenFWIConfig",
    "jhtdb": "JHTDBConfig",
    "digital_rocks": "DigitalRocksConfig",
    "the_well": "TheWellConfig",
    "pdebench": "PDEBenchConfig",
}
USAGE = f"launch/ingest_data.py {'|'.join(FORMATS)} SOURCE STORE [key=value ...]"


def main(arguments: list[str]) -> None:
    if len(arguments) < 3 or any("=" in word for word in arguments[:3]):
        raise ConfigError(f"arguments={' '.join(arguments)!r}: three are needed. Usage: {USAGE}")
    name, source, store = arguments[0], Path(arguments[1]), Path(arguments[2])
    if name not in FORMATS:
        raise ConfigError(f"format={name}: not known. Choose one of {', '.join(FORMATS)}.")
    if not source.exists():
        raise ConfigError(f"source={source}: no such file or folder. Check the path.")
    raw = dict(_parse_override(word) for word in arguments[3:])
    import torch

    torch.set_num_threads(1)
    reader = import_module(f"data.ingest.{name}")
    config = parse_config(getattr(reader, FORMATS[name]), raw, source="the command line")
    _make_parent(store)
    written = reader.ingest(source, store, config, print)
    what = f"{written.num_written} written" if written.num_written else "complete already"
    print(f"{store}: {what}, digest {written.digest[:12]}")


def _make_parent(store: Path) -> None:
    """Make the folder that STORE will stand in; ConfigError where none can be written there."""
    if store.exists() and not store.is_dir():
        raise ConfigError(f"store={store}: is a file. Choose another name for the store.")
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=store.parent, prefix=f".{store.name}."):
            pass
    except OSError as error:
        raise ConfigError(
            f"store={store}: cannot be written ({error.strerror or error}). Choose another place for the store."
        ) from None


def _parse_override(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"argument={word!r}: not key=value. Write for example num_test=2.")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{word!r}: the value is not valid YAML. Quote it.") from None


if __name__ == "__main__":
    run(main)
