"""Join a run's tokenizer and its newest pretrained model in one safetensors file, the thing to share.

python launch/export_model.py configs/evaluate_model/quickstart.yaml runs/quickstart/shodh.safetensors [key=value ...]
python launch/export_model.py runs/quickstart runs/quickstart/shodh.safetensors [tokenizer=PATH]

Read it with shodh.model.pretrained.from_pretrained and tokenizer.export.load_tokenizer. Weights are FP32.
"""

from pathlib import Path

from shodh.command_line import run

USAGE = "launch/export_model.py RUN|CONFIG.yaml OUT.safetensors [key=value ...]"


def main(arguments: list[str]) -> None:
    if len(arguments) < 2 or any("=" in argument for argument in arguments[:2]):
        raise ValueError(f"no run and no file to write given. Usage: {USAGE}")
    source, out, overrides = Path(arguments[0]), Path(arguments[1]), arguments[2:]
    if out.suffix != ".safetensors":
        raise ValueError(f"out={out}: is not named like what is written. Call it NAME.safetensors.")
    from parts import read_newest_model, require_latents
    from settings import read_export

    from shodh.model.pretrained import describe_model
    from shodh.model.transformer import count_parameters
    from shodh.tensor_file import join_parts, write_tensors
    from shodh.units import format_bytes
    from tokenizer.export import read_tokenizer_part

    settings = read_export(source, overrides)
    pretrained = read_newest_model(settings.run)
    tokenizer = read_tokenizer_part(settings.tokenizer or Path(pretrained.description.config["tokenizer"]))
    require_latents(pretrained.description, tokenizer.metadata["digest"], settings.run)
    model = describe_model(pretrained)
    write_tensors(out, join_parts({"tokenizer": tokenizer, "model": model}))
    total, active = count_parameters(pretrained.model)
    print(
        f"{out}: {format_bytes(out.stat().st_size)}, model of {total:,} parameters ({active:,} active) after step "
        f"{pretrained.description.step}, digest {model.metadata['model_digest'][:12]}"
    )


if __name__ == "__main__":
    run(main)
