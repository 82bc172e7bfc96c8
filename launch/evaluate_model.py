"""Evaluate a pretrained model on held-out trajectories: evaluation.json, slices.npz, report.html, and a printed table.

python launch/evaluate_model.py configs/evaluate_model/quickstart.yaml [key=value ...]
"""

from shodh.command_line import run, split_arguments


def main(arguments: list[str]) -> None:
    path, overrides = split_arguments(arguments, "launch/evaluate_model.py CONFIG.yaml [key=value ...]")
    import torch
    from parts import fit_baselines, hold_out, load_model, open_tokenized
    from settings import Evaluation

    from shodh.config import load_config
    from shodh.evaluation.held_out import evaluate, write_evaluation
    from shodh.evaluation.report import format_table, write_report

    config = load_config(Evaluation, path, overrides)
    torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, stores, latents = open_tokenized(config.stores, config.latents, config.tokenizer, config.domains)
    model, description = load_model(config.run, tokenizer, device)
    baselines = fit_baselines(tokenizer, stores)
    held_out = [hold_out(tokenizer, *pair, device, baselines=baselines) for pair in zip(stores, latents, strict=True)]
    evaluation = {"run": description, **evaluate(model, held_out)}
    write_evaluation(config.run, evaluation, model, held_out)
    print(format_table(evaluation))
    print(f"report -> {write_report(config.run)}")


if __name__ == "__main__":
    run(main)
