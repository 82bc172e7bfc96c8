"""From nothing to the published table beside ours, in pieces of some minutes: data, tokenizer, latents, model, figures.

    python launch/reproduce.py configs/reproduce/base.yaml [key=value ...]     # one piece; debug.yaml: the dry run
    python launch/reproduce.py export configs/reproduce/base.yaml FOLDER       # results and newest checkpoint, in parts
    python launch/reproduce.py import configs/reproduce/base.yaml FOLDER       # the same on a new machine

Exit code 0: all is done, and the table is printed. 75: the piece is over (``minutes``), the same command continues,
which `make reproduce` does until all is done. 1: something is wrong, in one line. Each step is the launch script of its
name with the paths of this config; what is done is skipped, what was interrupted continues. Neither wandb nor porespy
nor deepwave nor matplotlib need be installed; with deepwave, fwi is among the domains (``fwi``).

State is in ``run`` and ``stores``. With ``export=FOLDER`` each piece leaves there, in parts of at most 15 MiB with
digests, what a new machine needs to go on, but for data and latents. That is done when the piece's time is over and
takes its own: for the 6 GB checkpoint of ``base`` 10 s to a minute, depending on the disk (an estimate); parts that are
there unchanged are not written again. Data and latents are made again: with the same bits on a CPU, and, as each GPU
batch at 128^3 is one trajectory, on a GPU of the same kind with the same libraries (which has not been measured). Where
they come out otherwise, training refuses to go on from a checkpoint of other data.
"""

import os
import sys
from pathlib import Path

from shodh.command_line import run, split_arguments

MORE = os.EX_TEMPFAIL  # 75: not done, but nothing is wrong


def main(arguments: list[str]) -> None:
    from pieces import run_piece
    from reproduction import Reproduction, list_steps, require_domains, select_results

    from shodh.config import load_config
    from shodh.evaluation.published_table import write_published
    from shodh.parcel import pack, unpack

    verb = arguments.pop(0) if arguments[:1] in (["export"], ["import"]) else "run"
    usage = f"launch/reproduce.py {'' if verb == 'run' else verb + ' '}CONFIG.yaml [key=value ...]"
    path, overrides = split_arguments(arguments, usage + ("" if verb == "run" else " FOLDER"))
    folder = None if verb == "run" else Path(_take_folder(overrides, usage + " FOLDER"))
    config = load_config(Reproduction, path, overrides)
    if verb == "import":
        assert folder is not None
        names = unpack(folder, config.run)
        return print(f"{len(names)} files -> {config.run}; now: python launch/reproduce.py {path}")
    if verb == "run":
        steps = list_steps(config, require_domains(config))
        stopped = run_piece(steps, config.run, 60 * config.minutes, config.stop_seconds)
        if stopped is None:
            print(write_published(config.run), f"\nall is done -> {config.run}/table.json", sep="\n")
        folder = config.export
    if folder is not None:
        num = pack(select_results(config), folder)
        print(f"exported {num} parts -> {folder}")
    if verb == "run" and stopped is not None:
        print(f"piece done: {stopped}; the same command continues", flush=True)
        sys.exit(MORE)


def _take_folder(overrides: list[str], usage: str) -> str:
    folders = [argument for argument in overrides if "=" not in argument]
    if len(folders) != 1:
        raise ValueError(f"{len(folders)} folders given, must be one. Usage: {usage}")
    overrides.remove(folders[0])
    return folders[0]


if __name__ == "__main__":
    run(main)
