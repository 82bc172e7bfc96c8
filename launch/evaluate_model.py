"""Evaluate a pretrained model on held-out trajectories: evaluation.json, slices.npz, report.html, and a printed table.

python launch/evaluate_model.py configs/evaluate_model/quickstart.yaml [key=value ...]
python launch/evaluate_model.py configs/evaluate_model/quickstart.yaml exported=runs/quickstart/shodh.safetensors

Or certify what its tokenizer conserves (certificate.json, report.html, a printed table; exit code 1 if it does not),
on held-out fields where the config's stores are there, and on random latents:

python launch/evaluate_model.py certificate configs/evaluate_model/quickstart.yaml [key=value ...]
python launch/evaluate_model.py certificate runs/quickstart/tokenizer.safetensors [num_random=4 ...]
"""

from pathlib import Path

from shodh.command_line import run, split_arguments


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["certificate"]:
        return write_certified(arguments[1:])
    path, overrides = split_arguments(arguments, "launch/evaluate_model.py CONFIG.yaml [key=value ...]")
    import torch
    from parts import describe_run, fit_baselines, fit_linear, hold_out, load_model, open_tokenized
    from settings import Evaluation

    from shodh.config import load_config
    from shodh.device import find_device
    from shodh.evaluation.held_out import evaluate, write_evaluation
    from shodh.evaluation.report import format_table

    config = load_config(Evaluation, path, overrides)
    torch.set_num_threads(config.threads)
    device = find_device()
    file = config.exported or config.tokenizer
    tokenizer, stores, latents = open_tokenized(config.stores, config.latents, file, config.domains)
    pretrained = load_model(config.exported or config.run, tokenizer, device)
    model = pretrained.model
    config.run.mkdir(parents=True, exist_ok=True)  # an exported file may have come without its run
    baselines = fit_baselines(tokenizer, stores)
    held_out = [
        hold_out(
            *(tokenizer, store, cache, device),
            baselines=baselines,
            forecasters={"linear": fit_linear(cache, device)},
            project=config.project,
        )
        for store, cache in zip(stores, latents, strict=True)
    ]
    evaluation = {"run": describe_run(pretrained), "certificate": tokenizer.certificate, **evaluate(model, held_out)}
    write_evaluation(config.run, evaluation, model, held_out)
    print(format_table(evaluation))
    print(_write_report(config.run))


def write_certified(arguments: list[str]) -> None:
    """The certificate of a tokenizer; RuntimeError if it does not conserve exactly."""
    usage = "launch/evaluate_model.py certificate CONFIG.yaml|TOKENIZER.safetensors [key=value ...]"
    path, overrides = split_arguments(arguments, usage)
    import torch
    from certification import certify_tokenizer, parse_statistics
    from parts import open_stores, require_tokenizer
    from settings import Evaluation

    from shodh.config import load_config, parse_config
    from shodh.device import find_device
    from shodh.evaluation.certificate import CertificateConfig, format_certificate, require_exact, write_certificate
    from tokenizer.export import load_tokenizer

    if Path(path).suffix == ".safetensors":
        file, folder, stores = Path(path), Path(path).parent, []
        given = {key: value for key, _, value in (override.partition("=") for override in overrides)}
        sizes = parse_config(CertificateConfig, given, source="the command line")
    else:
        config = load_config(Evaluation, path, overrides)
        torch.set_num_threads(config.threads)
        file, folder, sizes = config.exported or config.tokenizer, config.run, config.certificate
        stores = open_stores(config.stores, config.domains) if config.stores.is_dir() else []
    tokenizer = load_tokenizer(file)
    parse_statistics(tokenizer.domains, tokenizer.statistics)
    for store in stores:
        require_tokenizer(tokenizer, store)
    grids = {store.domain.name: store.grid for store in stores}
    certificate = certify_tokenizer(
        tokenizer.autoencoder.to(find_device()), tokenizer.domains, tokenizer.statistics, grids, sizes, stores
    )
    folder.mkdir(parents=True, exist_ok=True)
    print(format_certificate(certificate))
    print(f"certificate -> {write_certificate(folder, certificate)}")
    print(_write_report(folder))
    require_exact(certificate, file)


def _write_report(folder: Path) -> str:
    """Where the report is, or why there is none: its figures need matplotlib, the measurements do not."""
    from shodh.evaluation.report import write_report

    try:
        return f"report -> {write_report(folder)}"
    except ModuleNotFoundError as error:
        return f"no report: {error.name} is not installed; all figures are in {folder}"


if __name__ == "__main__":
    run(main)
