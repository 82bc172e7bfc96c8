"""Simulate 2-D seismic gathers over velocity maps in OpenFWI's ten styles, in OpenFWI's own files and sign.

    python launch/generate_gathers.py configs/generate_gathers/quickstart.yaml [families=[style-a]] [shard=0/4]

Writes FOLDER/<family>/ (FlatVel_A, ..., Style_B) with SHA256SUMS, and FOLDER/manifest.jsonl with what each file was
made from. Running it again adds what is missing and verifies what is there. Several processes, each with its own
shard=i/n, share one folder.
"""

from shodh.command_line import run, split_arguments
from shodh.config import ConfigError, load_config


def main(arguments: list[str]) -> None:
    path, overrides = split_arguments(arguments, "python launch/generate_gathers.py CONFIG [key=value ...]")
    from data.simulate.openfwi_files import GathersConfig, plan_files, write_files

    config = load_config(GathersConfig, path, overrides)
    import torch
    from tqdm import tqdm

    from data.simulate.seismic_survey import Survey, record_gathers

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: this machine has none that PyTorch can use. Set device=cpu.")
    torch.set_num_threads(1)  # processes share the work by shard=i/n; a second thread slows these sizes down
    survey = Survey()

    def record(maps):
        return record_gathers(torch.from_numpy(maps[:, 0]).to(config.device), survey).cpu().numpy()

    num_maps = len(plan_files(config)) * config.maps_per_file
    with tqdm(desc=str(config.folder), total=num_maps, unit="map", dynamic_ncols=True, mininterval=1.0) as bar:
        written = write_files(config, record, progress=bar.update)
    print(f"{config.folder}: {written.num_written} pairs of files added, {written.num_intact} intact before")


if __name__ == "__main__":
    run(main)
